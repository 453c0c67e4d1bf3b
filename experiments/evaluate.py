"""Measure a model's natural and adversarial accuracy, or compare several, transferred ones included.

    python launch.py --config=experiments/evaluate.py --config.evaluate.model=runs/l2/model \
        --config.evaluate.num_steps=50 --config.evaluate.num_restarts=3 --config.evaluate.step_ratio=0.05 \
        --workdir=runs/l2-pgd50

The attack is ℓ2 PGD with radius config.evaluate.eps on the test split of config.evaluate.dataset. Every image
counts once, whatever the batch size and the number of devices. Writes `evaluation.json` to the workdir.

    python launch.py --config=experiments/evaluate.py:curves --config.evaluate.model=\
runs/quickstart/sources/natural,runs/quickstart/sources/l2_0.25 --workdir=runs/curves

compares models: accuracy against ε under ℓ2 and ℓ∞ attacks, natural against robust accuracy, warnings where
an accuracy may not be robustness, and what the features' sensitivity says of the heads. Writes `report.html`
and its numbers as CSV. `--config.evaluate.auto_attack=standard` adds AutoAttack at config.evaluate.norm and
eps. `:curves` has radii for images of 16×16: 151 s of two cores for these two, whose accuracy of 99.7 % falls
to 70.2 and 91.8 % under ℓ2 PGD-20 with ε = 0.25, and to 12.9 and 51.0 % with 0.5. `:paper` is for
ImageNet networks: 128 steps of 2.5 ε / 128, as in Utrera et al. (2021).
"""

from advtransfer import config as base

RADII = {
    "curves": {"l2_epsilons": (0.125, 0.25, 0.5, 1.0, 2.0), "linf_epsilons": (0.01, 0.02, 0.04, 0.08)},
    "paper": {
        "l2_epsilons": (0.25, 0.5, 1.0, 2.0, 3.0, 5.0),
        "linf_epsilons": tuple(steps / 255 for steps in (0.5, 1, 2, 4, 8)),
    },
}


def get_config(settings="one"):
    config = base.default()
    config.stage = "evaluate"
    if settings in RADII:
        config.evaluate.update(RADII[settings])
    elif settings != "one":
        raise ValueError(f"unknown settings {settings!r}: one, curves or paper")
    if settings == "paper":
        config.evaluate.update(norm="l2", eps=3.0, num_steps=128, step_ratio=2.5 / 128)
    return config
