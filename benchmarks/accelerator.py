"""One accelerator, measured within so many minutes: is it right, and how fast.

    python -m benchmarks.accelerator --minutes=8 --peer=torch --out=runs/accelerator

right: against float64, the CPU and itself (benchmarks/right.py).
steps: images per second of the forward pass, an attack pass, and training steps, clean and against PGD-1, 3
  and 7, in bfloat16, beside PyTorch (benchmarks/steps.py). "roofline" is the share of what the measured peaks
  of a matrix product and of a copy allow (see `bound`).
attacks: what AutoAttack's four attacks evaluate a second, on a network that none of them fools.
study: fine-tuning from cached activations, and many trials in one program (benchmarks/study.py).
path: sources on CIFAR-10, transferred to MNIST (benchmarks/path.py); `--data` names the folder that
  benchmarks.subsets made, without it letters go to digits.

Rows are printed as they are measured, and accelerator.json and accelerator.md in `--out` written with each.
On a CPU everything is tiny: that tests the script and measures nothing. PyTorch takes its memory beside
JAX, which preallocates 60 % here unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advtransfer import parallel
from advtransfer.attacks import L2, Linf, auto_attack
from advtransfer.attacks.apgd import apgd, targeted_apgd
from advtransfer.attacks.fab import targeted_fab
from advtransfer.attacks.square import square
from advtransfer.evaluate import predict
from advtransfer.models import block_flops, create_module, init_variables
from advtransfer.models.cost import layers
from benchmarks import path, right, study
from benchmarks.steps import Case, Step, alternate, num_attack_steps, our_steps, quartiles, torch_steps

SECTIONS = ("right", "steps", "study", "path", "attacks")
STEPS = ("clean", "pgd3", "attack", "forward", "pgd7", "pgd1")

Row = tuple[str, dict[str, Any]]  # what was measured, and the figures by name
Part = Callable[[], Iterator[Row]]


class Peaks(NamedTuple):
    """What the device does at best, measured."""

    flops: float  # per second, of a bfloat16 matrix product
    bandwidth: float  # bytes read and written per second, of a copy


class Options(NamedTuple):
    tiny: bool
    dtype: Any
    peer: bool
    turns: int
    data: str | None
    source_seconds: float
    clock: Callable[[], float]  # seconds left


def measure_peaks(tiny: bool) -> Peaks:
    """Of a product of two square matrices with random entries, and of an array's copy; medians of 10."""
    side, length = (512, 2**20) if tiny else (8192, 2**29)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (length,), jnp.float32)

    def time_of(function, *args):
        function = jax.jit(function)
        jax.block_until_ready(function(*args))
        times = []
        for _ in range(10):
            started = time.perf_counter()
            jax.block_until_ready([function(*args) for _ in range(5)][-1])
            times.append((time.perf_counter() - started) / 5)
        return statistics.median(times)

    return Peaks(2 * side**3 / time_of(jnp.matmul, a, a), 2 * x.nbytes / time_of(lambda x: x + 1, x))


def activation_size(architecture: str, image_size: int) -> int:
    """Numbers that the convolutions of a network put out for one image."""
    found = layers(create_module(architecture), image_size)  # ty: ignore[invalid-argument-type] (modules hash)
    return sum(math.prod(layer.output) for layer in found if layer.place != "fc")


def bound(case: Case, name: str, peaks: Peaks, bytes_per_number: int) -> float:
    """Images per second that the peaks allow: the slower of arithmetic and of memory.

    A forward pass takes F operations, a gradient to the images F more, one to the weights another F. It
    moves each convolution's output twice (written, read by the next, with BatchNorm and ReLU on the way);
    the gradient to the images moves it three times (gradient written and read, ReLU's sign read). Training
    moves it four times forward (statistics need it whole) and ten times backward (BatchNorm reads the output
    and its gradient twice and writes one; the two products read that twice and an input, and write one).
    """
    flops = sum(block_flops(create_module(case.architecture), case.image_size))
    size = activation_size(case.architecture, case.image_size) * bytes_per_number
    passes = {"forward": (1, 2), "attack": (2, 5)}
    if name not in passes:
        attacks = num_attack_steps(name)
        passes[name] = (3 + 2 * attacks, 14 + 5 * attacks)
    products, moves = passes[name]
    return 1 / max(products * flops / peaks.flops, moves * size / peaks.bandwidth)


def describe(peaks: Peaks, options: Options) -> Row:
    device = jax.local_devices()[0]
    versions = {"Python": platform.python_version(), "JAX": jax.__version__}
    if options.peer:
        import torch

        versions["PyTorch"] = torch.__version__
    return f"{jax.local_device_count()} × {device.device_kind}", {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "bf16 product, TFLOP/s": peaks.flops / 1e12,
        "copy, TB/s": peaks.bandwidth / 1e12,
        "CPU cores": os.cpu_count(),
    }


def right_parts(options: Options, peaks: Peaks) -> list[Part]:
    def rows(check):
        for found in check():
            bounded = math.isfinite(found.bound)
            yield (
                found.what,
                {
                    "difference": f"{found.found:.2e}",
                    "at most": f"{found.bound:.1e}" if bounded else "",
                    "verdict": ("right" if found.passed else "WRONG") if bounded else "",
                },
            )

    checks = right.checks(tiny=options.tiny, peer=options.peer)
    return [functools.partial(rows, check) for check in checks]


def steps_parts(options: Options, peaks: Peaks) -> list[Part]:
    if options.tiny:
        return [
            functools.partial(time_steps, Case("resnet_tiny", 16, 16), (16, 32), STEPS[:4], options, peaks)
        ]
    return [
        functools.partial(time_steps, Case("resnet50", 256, 224), (128, 256), STEPS, options, peaks),
        functools.partial(
            time_steps, Case("resnet18_cifar", 1024, 32), (512, 1024), STEPS[:4], options, peaks
        ),
    ]


def time_steps(
    case: Case, batches: Sequence[int], names: Sequence[str], options: Options, peaks: Peaks
) -> Iterator[Row]:
    """The clean step at each batch size, then all steps at the best, beside PyTorch's."""
    rng = np.random.default_rng(0)
    images = rng.random((max(batches), case.image_size, case.image_size, 3), np.float32)
    labels = rng.integers(0, 1000, max(batches), np.int32)

    def build(batch, names):
        return our_steps(case, images[:batch], labels[:batch], options.dtype, names)

    with ThreadPoolExecutor(len(batches)) as threads:
        tried = list(threads.map(lambda batch: build(batch, ("clean",)), batches))
    rates = []
    for batch, (steps, *_) in zip(batches, tried, strict=True):
        times = alternate({"ours": steps["clean"]}, options.turns)["ours"]
        rates.append(batch / statistics.median(times))
        yield f"{case.architecture} {case.image_size}², batch {batch}, clean", {"ours, images/s": rates[-1]}
    best = int(np.argmax(rates))
    case = case._replace(batch_size=batches[best])
    images, labels = images[: case.batch_size], labels[: case.batch_size]
    ours, module, variables = tried[best]
    del tried
    with ThreadPoolExecutor(1) as thread:
        others = thread.submit(build, case.batch_size, [name for name in names if name != "clean"])
        peer = {}
        if options.peer:
            device = "cuda" if parallel.platform() == "gpu" else "cpu"
            peer = torch_steps(module, variables, images, labels, device=device, names=names)
            for step in peer.values():
                step.run(2)  # compiles it, while XLA compiles ours
        ours |= others.result()[0]
    for name in names:
        sides = {"ours": ours[name]} | ({"peer": peer[name]} if peer else {})
        yield _compare(case, name, sides, peaks, options)


def _compare(case: Case, name: str, sides: dict[str, Step], peaks: Peaks, options: Options) -> Row:
    """A step's row: both sides' medians, and the median of the ratios turn by turn [quartiles]."""
    times = alternate(sides, options.turns)
    rates = {side: case.batch_size / statistics.median(t) for side, t in times.items()}
    row: dict[str, float | str] = {"ours, images/s": rates["ours"]}
    if "peer" in sides:
        low, middle, high = quartiles([b / a for a, b in zip(times["ours"], times["peer"], strict=True)])
        row |= {"PyTorch, images/s": rates["peer"], "ratio": f"{middle:.2f} [{low:.2f}, {high:.2f}]"}
    share = rates["ours"] / bound(case, name, peaks, np.dtype(options.dtype).itemsize)
    step = sides["ours"]
    row |= {"roofline": share, "compile s": step.compile_seconds, "temporary GB": step.temporary_bytes / 1e9}
    return f"{case.architecture} {case.image_size}², batch {case.batch_size}, {name}", row


def study_parts(options: Options, peaks: Peaks) -> list[Part]:
    if options.tiny:
        return [
            functools.partial(study.groups, 1, 32, 4, 2, (1,)),
            functools.partial(study.heads, 1, (20,)),
        ]
    return [
        *(
            functools.partial(study.groups, options.turns, 224, batch_size, 20, (k,))
            for k, batch_size in ((1, 20), (1, 128), (3, 20), (3, 128))
        ),
        functools.partial(study.heads, options.turns, (400,)),
        functools.partial(study.cache, options.turns, 224, 128),
    ]


def attacks_parts(options: Options, peaks: Peaks) -> list[Part]:
    case, steps = Case("resnet18_cifar", 1024, 32), 100
    if options.tiny:
        case, steps = Case("resnet_tiny", 16, 16), 2
    module = create_module(case.architecture, num_classes=10, dtype=options.dtype)
    network = Partial(module.apply, init_variables(module, jax.random.key(0), case.image_size))
    images = np.random.default_rng(0).random(
        (case.batch_size, case.image_size, case.image_size, 3), np.float32
    )
    labels = np.argmax(predict(network, images), axis=1)
    attacks = {
        "apgd-ce": (apgd(num_steps=steps), steps),
        "apgd-t": (targeted_apgd(num_targets=1, num_steps=steps), steps),
        "fab-t": (targeted_fab(num_targets=1, num_steps=steps), steps),
        "square": (square(num_queries=10 * steps), 10 * steps),
    }

    def rows(norm):
        for name, (search, evaluations) in attacks.items():
            seconds = []
            for _ in range(2):  # the first compiles
                started = time.monotonic()
                # Nothing is found within a ball this small.
                auto_attack(
                    network,
                    images,
                    labels,
                    norm(1e-6),
                    attacks={name: search},
                    batch_size=case.batch_size,
                )
                seconds.append(time.monotonic() - started)
            what = f"{case.architecture} {case.image_size}², batch {case.batch_size}, {norm.__name__}, {name}"
            yield what, {"image-steps/s": case.batch_size * evaluations / seconds[1], "first s": seconds[0]}

    return [functools.partial(rows, norm) for norm in (Linf, L2)]


def path_parts(options: Options, peaks: Peaks) -> list[Part]:
    def rows():
        made = path.setting(
            options.data, tiny=options.tiny, dtype=options.dtype, seconds=options.source_seconds
        )
        yield from path.run(made, options.clock)

    return [rows]


def table(rows: list[Row]) -> str:
    """Rows as a markdown table, whose columns are all the figures that any row has."""
    columns = list(dict.fromkeys(name for _, figures in rows for name in figures))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for what, figures in rows:
        lines.append("| " + " | ".join([what, *(_cell(figures.get(name, "")) for name in columns)]) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--sections", default=",".join(SECTIONS[:3]), help=", ".join(SECTIONS))
    parser.add_argument("--peer", default="none", choices=("torch", "none"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--data", default=None, help="folder of benchmarks.subsets; for path")
    parser.add_argument("--source-seconds", type=float, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    parallel.one_device_per_core()
    names = args.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    ends = time.monotonic() + 60 * args.minutes
    tiny = parallel.platform() == "cpu"
    options = Options(
        tiny=tiny,
        dtype=jnp.float32 if tiny else jnp.bfloat16,
        peer=args.peer == "torch",
        turns=args.turns,
        data=args.data,
        source_seconds=args.source_seconds,
        clock=lambda: ends - time.monotonic(),
    )
    found: dict[str, list[Row]] = {}

    def keep(section: str, row: Row) -> None:
        found.setdefault(section, []).append(row)
        what, figures = row
        shown = ", ".join(f"{name} {_cell(value)}".strip() for name, value in figures.items())
        print(f"[{options.clock():4.0f} s left] {section}: {what}: {shown}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "accelerator.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
        tables = [f"## {name}\n\n{table(rows)}\n" for name, rows in found.items()]
        (args.out / "accelerator.md").write_text("\n".join(tables))

    peaks = measure_peaks(tiny)
    keep("device", describe(peaks, options))
    sections = {
        "right": right_parts,
        "steps": steps_parts,
        "study": study_parts,
        "path": path_parts,
        "attacks": attacks_parts,
    }
    failed = False
    for name in names:
        for part in sections[name](options, peaks):
            try:
                for row in part():
                    keep(name, row)
                    if options.clock() < 0:
                        raise SystemExit(failed)
            except Exception:  # what comes after it is measured all the same
                failed = True
                traceback.print_exc()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
