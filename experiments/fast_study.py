"""The paper's grid with frozen blocks computed once: about a day on one GPU instead of two weeks.

    python launch.py --config=experiments/fast_study.py --workdir=runs/fast --plan
    python launch.py --config=experiments/fast_study.py --workdir=runs/fast

The 14,400 models of experiments/paper_study.py with a different protocol: frozen layers keep the source's
statistics (`--config.transfer.frozen_batch_norm=target` estimates them on each subset instead), there is no
augmentation (`--config.transfer.augmentation.preset=utrera --config.transfer.num_views=8` draws eight views
of each image once and caches them), training takes 100 epochs but at most 2,500 steps, and every network
normalises by its own statistics. The learning rate can be chosen on validation images:
`--config.study.learning_rates="(0.3, 0.1, 0.03)"`. To use your own sources:
`--config.study.sources=FOLDER,FOLDER`.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    base.set_paper_grid(config)
    config.transfer.update(num_epochs=100, max_steps=2500, evaluate_epochs=(1, 11, 21, 41, 81, 100))
    return config
