"""AutoAttack (Croce and Hein, 2020): four attacks without parameters to choose, each on what is left."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Integer, PRNGKeyArray

from advtransfer.arrays import AnyArray
from advtransfer.attacks.apgd import apgd, targeted_apgd
from advtransfer.attacks.checks import RobustnessWarning, check_black_box, check_network
from advtransfer.attacks.fab import targeted_fab
from advtransfer.attacks.iterative import IterativeAttack, run_attack
from advtransfer.attacks.network import LogitsFn, as_network, in_batches
from advtransfer.attacks.pgd import check_images, check_sizes, typed
from advtransfer.attacks.square import square
from advtransfer.attacks.threat_models import L2, Linf
from advtransfer.labels import check_labels

_MOST_TARGETS = 9
VERSIONS = ("standard", "plus")


class AutoAttackResult(NamedTuple):
    """What AutoAttack found."""

    images: Float32[np.ndarray, "n h w c"]  # adversarial where one was found, elsewhere as they were
    robust: Bool[np.ndarray, " n"]  # right on the image, and on all that the attacks tried
    accuracy: dict[str, float]  # "clean", then after each attack, the share that is still right
    warnings: tuple[RobustnessWarning, ...]  # what makes these numbers doubtful


def auto_attack(
    logits_fn: LogitsFn,
    images: Float[AnyArray, "n h w c"],
    labels: Integer[AnyArray, " n"],
    threat_model: L2 | Linf,
    *,
    version: str = "standard",
    key: PRNGKeyArray | None = None,
    batch_size: int = 256,
    attacks: dict[str, IterativeAttack] | None = None,
) -> AutoAttackResult:
    """The accuracy that is left after an ensemble of attacks (Croce and Hein, 2020, §5).

    Args:
      logits_fn: images [N, H, W, C] in [0, 1] to logits [N, classes], as for `pgd`.
      images: float [N, H, W, C] in [0, 1].
      labels: int [N], the true classes.
      threat_model: `L2(eps)` or `Linf(eps)`, in pixel units.
      version: "standard": APGD on cross-entropy, APGD-T, FAB-T, Square. "plus": APGD on cross-entropy and on
        DLR with five starts each, APGD-T, FAB-T with five starts, Square (the authors' plus has untargeted
        FAB with five starts and FAB-T with one).
      key: a PRNG key; the same gives the same result. None: `jax.random.key(0)`.
      batch_size: images at a time, over all devices.
      attacks: by name, instead of those of `version`.

    Returns:
      An `AutoAttackResult`, on the host.

    Raises:
      ValueError: images that are not floats in [0, 1]; labels that are not classes; an impossible eps; logits
        that are not finite; an unknown version.
    """
    if not isinstance(threat_model, L2 | Linf):
        raise ValueError(f"auto_attack takes L2(eps) or Linf(eps), not {type(threat_model).__name__}")
    chex.assert_rank(images, 4)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: pass floats in [0, 1], such as images / 255")
    check_sizes(threat_model, 0.0)
    check_images(images)
    images = np.clip(np.asarray(images, np.float32), 0.0, 1.0)
    batch = jax.ShapeDtypeStruct((min(batch_size, max(len(images), 1)), *images.shape[1:]), jnp.float32)
    network = as_network(logits_fn, batch)
    num_classes = jax.eval_shape(network, batch).shape[1]
    check_labels(labels, len(images), num_classes)
    labels = np.asarray(labels, np.int32)
    attacks = attacks_of(version, num_classes) if attacks is None else attacks
    threat_model = jax.tree.map(jnp.float32, threat_model)
    if not len(images):
        return AutoAttackResult(images, np.zeros(0, bool), dict.fromkeys(["clean", *attacks], np.nan), ())
    key = jax.random.key(0) if key is None else typed(key)

    logits = in_batches(network, _logits, images, batch.shape[0])
    if lost := int(np.sum(~np.isfinite(logits).all(axis=1))):
        raise ValueError(f"the logits of {lost:,} of {len(images):,} images are not finite numbers")
    classes = np.argsort(-logits, axis=1, kind="stable").astype(np.int32)  # the most probable first
    found, robust = images.copy(), classes[:, 0] == labels
    accuracy = {"clean": float(robust.mean())}
    for number, (name, attack) in enumerate(attacks.items()):
        left = np.flatnonzero(robust)
        if len(left) and num_classes > 1:
            fooled, shown = run_attack(
                logits_fn,
                attack,
                threat_model,
                images[left],
                labels[left],
                classes[left, 1 : 1 + attack.num_targets] if attack.num_targets else labels[left, None],
                key=jax.random.fold_in(key, number),
                numbers=left,
                batch_size=batch_size,
            )
            # In a batch of another shape sums are rounded differently.
            logits = in_batches(network, _logits, shown, batch.shape[0])
            fooled &= (np.argmax(logits, axis=1) != labels[left]) | ~np.isfinite(logits).all(axis=1)
            found[left[fooled]] = shown[fooled]
            robust[left[fooled]] = False
        accuracy[name] = float(robust.mean())
    warnings = ()
    if num_classes > 1:
        warnings = check_network(logits_fn, images[:batch_size], labels[:batch_size])
        warnings += _check_square(accuracy)
    return AutoAttackResult(found, robust, accuracy, warnings)


def attacks_of(version: str, num_classes: int) -> dict[str, IterativeAttack]:
    """The attacks of a version by name, in their order. DLR needs three classes and targeted DLR four: with
    fewer their place takes the margin.

    Raises:
      ValueError: an unknown version.
    """
    if version not in VERSIONS:
        raise ValueError(f"version={version!r}: take one of {', '.join(VERSIONS)}")
    targets = max(min(_MOST_TARGETS, num_classes - 1), 1)
    apgd_t = targeted_apgd("dlr" if num_classes > 3 else "margin", num_targets=targets)
    if version == "standard":
        return {
            "apgd-ce": apgd(),
            "apgd-t": apgd_t,
            "fab-t": targeted_fab(num_targets=targets),
            "square": square(),
        }
    return {
        "apgd-ce": apgd(num_starts=5),
        "apgd-dlr": apgd("dlr" if num_classes > 2 else "margin", num_starts=5),
        "apgd-t": apgd_t,
        "fab-t": targeted_fab(num_targets=targets, num_starts=5),
        "square": square(),
    }


def _check_square(accuracy: dict[str, float]) -> tuple[RobustnessWarning, ...]:
    """Square has to find what the attacks before it left."""
    names = list(accuracy)
    if names[-1] != "square" or len(names) < 3:
        return ()
    return check_black_box(accuracy[names[-2]], accuracy["square"])


def _logits(network: Partial, images: Float32[AnyArray, "n h w c"]) -> Float32[Array, "n classes"]:
    return network(images).astype(jnp.float32)
