"""Train one source network and measure its natural and adversarial accuracy.

    python launch.py --config=experiments/source.py --workdir=runs/natural
    python launch.py --config=experiments/source.py:l2:0.25 --workdir=runs/l2

The argument is natural, or NORM:EPS with ε in pixel units (l2_3, or linf_4 in 255ths, is accepted too). The
recipe is config.train, the same for all. Writes `model/` (for `at.load_model`), `evaluation.json`,
`log.jsonl` and TensorBoard events to the workdir. If it is killed, the same command resumes and ends at the
same weights.
"""

from advtransfer import config as base


def get_config(source="natural"):
    config = base.default()
    config.stage = "source"
    base.set_source(config, source)
    return config
