"""Fixed-feature and full-network transfer on all images (Salman et al., NeurIPS 2020, section 3).

    python launch.py --config=experiments/salman_study.py:fixed --workdir=runs/salman-fixed
    python launch.py --config=experiments/salman_study.py:full --workdir=runs/salman-full

The argument is fixed (train the head alone, k = 0) or full (train everything). The recipe is that of the
paper's code: SGD with momentum for 150 epochs, learning rate divided by 10 every 50, weight decay 5e-4, batch
64, random resized crops and flips. The learning rate, 0.01 or 0.001, is chosen on validation images for every
source and target. Targets that TFDS does not have are folders:
`--config.study.targets=folder:/birdsnap,folder:/aircraft`. `rows.csv` also has the mean per-class accuracy,
which the paper reports for some targets. For few images: `--config.study.num_train_images="(100, 400)"`.
"""

from advtransfer import config as base


def get_config(setting="fixed"):
    if setting not in ("fixed", "full"):
        raise ValueError(f"{setting!r} is none of fixed, full")
    config = base.default()
    base.set_paper_grid(config)
    config.report.reference = "none"
    config.study.update(
        targets="tfds:cifar10,tfds:cifar100,tfds:caltech101,tfds:dtd:train+validation,tfds:food101",
        num_train_images=(-1,),
        num_unfrozen_blocks=(0,) if setting == "fixed" else (-1,),
        num_seeds=3,
        seeds=(),
        fewer_seeds=(),
        learning_rates=(0.01, 0.001),
        search_seeds=1,
    )
    config.transfer.update(batch_size=64, evaluate_epochs=(150,), frozen_batch_norm="update")
    config.transfer.augmentation.preset = "salman"
    return config
