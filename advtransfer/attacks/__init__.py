"""Attacks: threat models (what an adversary may do), PGD and AutoAttack (how), signs that they failed.

Nothing here knows Flax. An attack sees `logits_fn`, a function from images [N, H, W, C] in [0, 1] to logits.
"""

from advtransfer.attacks.autoattack import VERSIONS, AutoAttackResult, auto_attack
from advtransfer.attacks.checks import (
    RobustnessWarning,
    check_black_box,
    check_large_eps,
    check_network,
    check_steps,
)
from advtransfer.attacks.losses import LossFn, cross_entropy, dlr, log_odds, margin, targeted_dlr
from advtransfer.attacks.network import LogitsFn, as_network, in_batches, jit_for
from advtransfer.attacks.pgd import SLACK, Attack, check_images, make_attack, pgd
from advtransfer.attacks.threat_models import L2, THREAT_MODELS, Linf, ThreatModel, Unconstrained

__all__ = [
    "L2",
    "SLACK",
    "THREAT_MODELS",
    "VERSIONS",
    "Attack",
    "AutoAttackResult",
    "Linf",
    "LogitsFn",
    "LossFn",
    "RobustnessWarning",
    "ThreatModel",
    "Unconstrained",
    "as_network",
    "auto_attack",
    "check_black_box",
    "check_images",
    "check_large_eps",
    "check_network",
    "check_steps",
    "cross_entropy",
    "dlr",
    "in_batches",
    "jit_for",
    "log_odds",
    "make_attack",
    "margin",
    "pgd",
    "targeted_dlr",
]
