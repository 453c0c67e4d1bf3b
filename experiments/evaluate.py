"""Measure a model's natural and adversarial accuracy.

    python launch.py --config=experiments/evaluate.py --config.evaluate.model=runs/l2/model \
        --config.evaluate.num_steps=50 --config.evaluate.num_restarts=3 --config.evaluate.step_ratio=0.05 \
        --workdir=runs/l2-pgd50

The attack is ℓ2 PGD with radius config.evaluate.eps on the test split of config.evaluate.dataset. Every image
counts once, whatever the batch size and the number of devices. Writes `evaluation.json` to the workdir.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "evaluate"
    return config
