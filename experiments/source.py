"""Train one source network and measure its natural and adversarial accuracy.

    python launch.py --config=experiments/source.py --workdir=runs/natural
    python launch.py --config=experiments/source.py:l2:0.25 --workdir=runs/l2

The argument is natural, or NORM:EPS with ε in pixel units (l2_3 and linf_4, in 255ths, are understood too);
the recipe is config.train, the same for all.
Leaves `model/` (for `at.load_model`), `evaluation.json`, `log.jsonl` and TensorBoard events in the workdir.
Killed at any moment, the same command goes on where it stopped and ends at the same weights.
"""

from advtransfer import config as base


def get_config(source="natural"):
    config = base.default()
    config.stage = "source"
    base.set_source(config, source)
    return config
