"""The paper's grid with the frozen blocks computed once: a day of one GPU instead of weeks.

    python launch.py --config=experiments/fast_study.py --workdir=runs/fast --plan
    python launch.py --config=experiments/fast_study.py --workdir=runs/fast

The 14,400 models of experiments/paper_study.py by another protocol: frozen layers keep the source's
statistics (`--config.transfer.frozen_batch_norm=target` re-estimates them on each subset), no augmentation
(`--config.transfer.augmentation.preset=utrera --config.transfer.num_views=8` draws each image's once and
caches them), 100 epochs but at most 2,500 steps, every network normalised by its own statistics. The learning
rate can be chosen on validation images: `--config.study.learning_rates="(0.3, 0.1, 0.03)"`. Your own sources:
`--config.study.sources=FOLDER,FOLDER`.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    base.set_paper_grid(config)
    config.transfer.update(num_epochs=100, max_steps=2500, evaluate_epochs=(1, 11, 21, 41, 81, 100))
    return config
