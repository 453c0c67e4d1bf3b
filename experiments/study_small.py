"""A whole study on a laptop: threat model, target, images, blocks, epochs and seeds, on built-in data.

    python launch.py --config=experiments/study_small.py --workdir=runs/study-small

Three sources trained on rendered capitals; two targets, handwritten digits and rendered lower-case letters;
four numbers of images; three numbers of trained blocks (head only, one block, two blocks); four epochs; five
seeds: 360 models in 5 min 30 s on 2 cores. The report shows accuracy and lead against images, epochs, trained
blocks and threat model for each target.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "study"
    config.study.update(
        sources="natural,l2:0.25,linf:0.01",
        targets="builtin:digits,builtin:lowercase",
        num_train_images=(20, 50, 100, 200),
        num_unfrozen_blocks=(0, 1, 2),
        num_seeds=5,
    )
    config.transfer.update(batch_size=20, num_epochs=30, evaluate_epochs=(1, 3, 10, 30))
    config.report.title = "Which robust source transfers best, to what, with how many images?"
    return config
