"""Attacks: threat models (what an adversary may do) and PGD (how it does it).

Nothing here knows Flax. An attack sees `logits_fn`, a function from images [N, H, W, C] in [0, 1] to logits.
"""

from advtransfer.attacks.pgd import LogitsFn, cross_entropy, make_attack, pgd
from advtransfer.attacks.threat_models import L2, THREAT_MODELS, Linf, ThreatModel, Unconstrained

__all__ = [
    "L2",
    "THREAT_MODELS",
    "Linf",
    "LogitsFn",
    "ThreatModel",
    "Unconstrained",
    "cross_entropy",
    "make_attack",
    "pgd",
]
