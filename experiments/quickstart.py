"""The whole claim on a laptop CPU, without a download: two sources, 480 transferred networks, one report.

    python launch.py

Trains a natural and an ℓ2-robust network on rendered letters, fine-tunes both on real handwritten digits for
20 to 800 labelled images (head alone, and head with the last block; 20 seeds), and writes
runs/quickstart/report.html.

EXPECT

Chosen without the target's test images. ε: the largest of 0.25, 0.5 and 1 at which the source's accuracy on
the glyphs' validation split stays within a point of natural training (source seeds 0, 1, 2: natural 99.4,
99.7, 99.7 %; ε = 0.25: 99.8, 99.8, 100 %; ε = 0.5, seeds 0 and 1: 92.8, 98.6 %; ε = 1, seed 0: 4.8 %).
Fine-tuning: learning rate 0.1, of 0.03, 0.1, 0.3 and 1, and 30 epochs, 0.2 points behind 100, by the accuracy
of both sources' seed 0 on the digits' validation split, head only.
"""

from advtransfer import config as base

REMARKS = (
    "ε was chosen among 0.25, 0.5 and 1 by the accuracy of the sources on their own validation images, the "
    "learning rate and the number of epochs by the digits' validation split; the test images chose nothing.",
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
    return config
