"""The paper's 14,400 fine-tuned ResNet-50s, by its exact protocol (Utrera et al., ICLR 2021).

    python launch.py --config=experiments/paper_study.py --workdir=runs/paper --plan
    python launch.py --config=experiments/paper_study.py --workdir=runs/paper

Sources come from the Hugging Face hub, targets from prepared TFDS sets (docs/datasets.md). Start one process
per device, all with the same workdir: they divide the work. For one target and one k:
`--config.study.targets=tfds:cifar10 --config.study.num_unfrozen_blocks="(3,)"`.

Details that the paper's code has and other protocols may not: frozen BatchNorm layers keep updating their
statistics; the natural source normalises by the target's statistics, robust ones by their own; heads start
from N(0, 1); colour targets are augmented in every step, grey ones not; subsets are random except for one
image of every class. One difference: the paper's code also augments SVHN's test images. The study has never
been run to its end: by its operations and MLPerf's share of the peak, `--plan` says 326 hours of an H200.
experiments/fast_study.py takes 20.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    base.set_paper_grid(config)
    config.transfer.update(
        frozen_batch_norm="update", input_norm="target", head_init="normal", head_scale=1.0
    )
    config.transfer.augmentation.preset = "utrera"
    return config
