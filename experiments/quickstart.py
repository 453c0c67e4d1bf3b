"""Robust against natural sources on a laptop CPU: two sources, 480 transferred networks, one report.

    python launch.py

Trains a natural and an ℓ2-robust network on rendered letters, fine-tunes both on 20 to 800 real handwritten
digits (head alone, and head with the last block; 20 seeds), and writes runs/quickstart/report.html.

Takes four to five minutes on 2 cores, without a download. Expect natural accuracy of 99.6 to 100 % for both
sources, and under ℓ2 PGD-20 with ε = 0.25 accuracy of 66 to 74 % (natural) and 91 to 95 % (ℓ2). With at most
100 images and the head alone, the robust source leads by 2 to 6 points, depending on the pair of sources:
rounding differs between machines and so changes the sources, as --config.seed does on one machine. README.md
has the figures.

The target's test images chose nothing. ε is the largest of 0.25, 0.5 and 1 at which the source's accuracy on
the glyphs' validation split stays within a point of natural training, for source seeds 0, 1, 2: natural 99.7,
99.6, 99.7 %; ε = 0.25: 99.7, 100, 100 %; 0.5: 90.4, 98.9, 99.0 %; 1: 5.8, 5.5, 4.9 % (measured with
--config.study.sources=natural,l2:0.25,l2:0.5,l2:1 --config.study.split=validation
--config.evaluate.split=validation --config.seed=SEED). For fine-tuning, the learning rate 0.1 (of 0.03 to 1)
and 30 epochs (100 gain 0.2 points) were chosen by the mean accuracy of both sources on the digits' validation
split.
"""

from advtransfer import config as base

REMARKS = (
    "The quickstart's own ε was chosen among 0.25, 0.5 and 1 by the accuracy of the sources on their own "
    "validation images, its learning rate and number of epochs by the digits' validation split; the test "
    "images chose nothing.",
    "The target is scikit-learn's 8×8 digits resized to 16×16: a small real set, far from ImageNet's scale.",
)


def get_config():
    config = base.default()
    config.transfer.batch_size = 20
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (1, 3, 10, 30)
    config.study.num_train_images = (20, 50, 100, 200, 400, 800)
    config.study.num_unfrozen_blocks = (0, 1)
    config.study.num_seeds = 20
    config.report.remarks = REMARKS
    config.report.analyses = config.interpret.analyses
    return config
