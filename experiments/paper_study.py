"""The paper's 14,400 fine-tuned ResNet-50s, by its protocol to the letter (Utrera et al., ICLR 2021).

    python launch.py --config=experiments/paper_study.py --workdir=runs/paper --plan
    python launch.py --config=experiments/paper_study.py --workdir=runs/paper

Sources come from the Hugging Face hub, targets from prepared TFDS sets (BUILD.md). Start it as often as there
are devices, on one workdir: groups are shared out. One target and one k:
`--config.study.targets=tfds:cifar10 --config.study.num_unfrozen_blocks="(3,)"`.

What its code does and others might not: frozen BatchNorm layers keep updating their statistics; the natural
source normalises by the target's statistics, robust ones by their own; heads start from N(0, 1); colour
targets are augmented anew in every step, grey ones not; subsets are random but for one image of every class.
Not imitated: SVHN's test images are augmented there, too. Never run to its end by us: by its operations and
MLPerf's share of the peak, `--plan` says 326 hours of an H200. experiments/fast_study.py takes 20.
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
