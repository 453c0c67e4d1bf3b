"""AutoAttack beside its authors' code: what each says of the same networks and images, and how long it takes.

    python -m benchmarks.autoattack --golden=DIR [--only=standard,apgd-t] [--peer] [--turns=1] [--images=64]

DIR holds networks (NAME.safetensors, networks.json), their images (images.npz: KIND_images, KIND_labels) and
what the authors' code said of them (official.json). Without `--peer` every attack is compared with that,
image by image. With it, ours and `pyautoattack` (PyPI; it needs torch) attack the first so many images in
turn, in one process and with all cores; `ratio` is the peer's time over ours: median [quartiles] over turns.
The first turn of ours compiles and is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import advtransfer as at
from advtransfer import parallel
from advtransfer.attacks.autoattack import attacks_of
from benchmarks.steps import quartiles

ALONE = ("apgd-ce", "apgd-t", "fab-t", "square")


class Case(NamedTuple):
    """A network, its images, and what the authors' code said of them."""

    name: str
    model: at.Model
    images: np.ndarray  # float32 [N, H, W, 3]
    labels: np.ndarray
    threat_model: at.L2 | at.Linf
    official: dict[str, Any]


def cases(folder: Path) -> Iterator[Case]:
    networks = json.loads((folder / "networks.json").read_text())
    stored = np.load(folder / "images.npz")
    for name, official in json.loads((folder / "official.json").read_text()).items():
        about = networks[official["network"]]
        model = at.import_torch_checkpoint(
            folder / f"{official['network']}.safetensors",
            architecture=about["architecture"],
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
        )
        kind = "digit" if official["network"] == "digits" else "glyph"
        images, labels = stored[f"{kind}_images"] / np.float32(255), stored[f"{kind}_labels"]
        threat_model = {"L2": at.L2, "Linf": at.Linf}[official["norm"]](official["eps"])
        yield Case(name, model, images, labels, threat_model, official)


def attack(case: Case, name: str, number: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """Flags of the images that are robust, and seconds."""
    own = attacks_of("standard", case.model.spec.num_classes)
    started = time.monotonic()
    found = at.auto_attack(
        at.logits_fn(case.model),
        case.images[:number],
        case.labels[:number],
        case.threat_model,
        attacks=None if name == "standard" else {name: own[name]},
        key=jax.random.key(seed),
    )
    return found.robust, time.monotonic() - started


def compare(case: Case, name: str) -> str:
    official = case.official[name]
    robust, seconds = attack(case, name, official["num_images"])
    theirs = np.array([*official["robust"]]) == "1"
    cells = [
        case.name,
        name,
        f"{robust.mean():.4f}",
        f"{theirs.mean():.4f}",
        f"{np.sum(~robust & theirs)}",
        f"{np.sum(robust & ~theirs)}",
        f"{seconds:.0f}",
    ]
    return " | ".join(cells)


def peer(case: Case, number: int) -> tuple[np.ndarray, float]:
    """The same of pyautoattack, `standard`."""
    import torch
    from pyautoattack import AutoAttack

    from benchmarks.torch_resnet import make_peer

    network = make_peer(case.model.module, case.model.variables).eval()
    images = torch.tensor(case.images[:number].transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(case.labels[:number].astype(np.int64))
    norm, eps = case.official["norm"], case.official["eps"]
    auto = AutoAttack(network, norm=norm, eps=eps, seed=0, version="standard", device="cpu")
    started = time.monotonic()
    adversarial, _ = auto.run_standard_evaluation(images, labels, batch_size=256)
    seconds = time.monotonic() - started
    with torch.no_grad():
        robust = network(adversarial).argmax(1) == labels
    return robust.numpy(), seconds


def race(case: Case, number: int, num_turns: int) -> str:
    attack(case, "standard", number)
    turns = [(attack(case, "standard", number), peer(case, number)) for _ in range(num_turns)]
    first, median, third = quartiles([theirs[1] / ours[1] for ours, theirs in turns])
    accuracies = " | ".join(f"{robust.mean():.4f}" for robust, _ in turns[0])
    times = " | ".join(
        f"{quartiles([side[1] for side in sides])[1]:.1f}" for sides in zip(*turns, strict=True)
    )
    return f"{case.name} | {number} | {accuracies} | {times} | {median:.2f} [{first:.2f}, {third:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--only", default=",".join(("standard", *ALONE)))
    parser.add_argument("--cases", default="", help="part of a case's name")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    args = parser.parse_args()
    parallel.one_device_per_core()
    if args.peer:
        print("case | images | ours | pyautoattack | ours, s | pyautoattack, s | ratio")
    else:
        print("case | attack | ours | official | fooled by ours only | by theirs only | seconds")
    for case in cases(args.golden):
        if args.cases not in case.name:
            continue
        if args.peer:
            print(race(case, args.images, args.turns), flush=True)
        for name in () if args.peer else args.only.split(","):
            print(compare(case, name), flush=True)


if __name__ == "__main__":
    main()
