"""Images per second of the streaming loader, beside bare decoding and a PyTorch DataLoader.

    python -m benchmarks.loading --images=600

Draws photographs of 500×375 pixels (smoothed noise and shapes, JPEG quality 90) into a temporary folder.
Three sides read the same files, decode and crop them by the same Pillow calls, each in `--workers` processes:
ours (Grain), decoding alone (a pool of processes that throws the results away), and PyTorch's DataLoader,
which collates to uint8. Each turn times `--batches` batches per side, in alternating order, after the batches
that lay ready have been taken and while the other sides stand still. The last column is ours / the side in
images per second, taken per turn: median [quartiles].
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFilter

from advtransfer.data.datasets import load_dataset
from advtransfer.data.decode import decode_crop
from advtransfer.data.stream import StreamedSplit, StreamOrder, iterate
from benchmarks.steps import quartiles

SIZE, MIN_AREA = 224, 0.08
_READY = 8  # no side has as many batches lying ready


def draw_photographs(folder: Path, num_images: int) -> None:
    """Writes train/CLASS/*.jpg, the same files whenever it is called."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        noise = rng.integers(0, 256, (47, 63, 3), np.uint8)
        image = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, width, height = (int(v) for v in rng.integers(0, (450, 330, 160, 160)))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + width, y + height), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        grain = rng.normal(0, 6, (375, 500, 3))
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2))) + grain
        path = folder / "train" / f"class{i % 10}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)


def decode(path: Path, seed: int) -> np.ndarray:
    """What all sides do to an image: ours calls the same function."""
    rng = np.random.default_rng([0, seed])
    return np.asarray(decode_crop(path, SIZE, rng, min_area=MIN_AREA, upright=True))


def our_batches(folder: Path, batch_size: int, workers: int) -> Iterator:
    """Batches without end."""
    name = f"folder:{folder}"
    train = load_dataset(name, image_size=SIZE, splits=("train",), loading="stream", cache_dir=folder).train
    assert isinstance(train, StreamedSplit)
    order = StreamOrder(seed=0, batch_size=batch_size, min_area=MIN_AREA)
    return iterate(train, order, 0, 10**9, num_workers=workers)


def torch_batches(paths: list[Path], batch_size: int, workers: int) -> Iterator:
    """Batches without end, and without the standstill of PyTorch's workers between epochs."""
    import torch

    class Photographs(torch.utils.data.Dataset):
        def __getitem__(self, index):
            # The copy is that of torchvision's pil_to_tensor: PyTorch wants memory that can be written to.
            return torch.from_numpy(decode(paths[index], index).copy()), 0

    def batches():
        rng = np.random.default_rng(0)
        while True:
            order = rng.permutation(len(paths))
            for start in range(0, len(paths) - batch_size + 1, batch_size):
                yield order[start : start + batch_size].tolist()

    return iter(torch.utils.data.DataLoader(Photographs(), batch_sampler=batches(), num_workers=workers))


def decode_chunk(chunk: list[tuple[int, Path]]) -> None:
    for seed, path in chunk:
        decode(path, seed)


def take(batches: Iterator, num_batches: int) -> float:
    """Seconds for so many batches, after those that lay ready."""
    for _ in range(_READY):
        next(batches)
    begin = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return time.perf_counter() - begin


def decode_alone(pool, paths: list[Path], batch_size: int, num_batches: int) -> float:
    """Seconds for as many images, without a pipeline."""
    images = list(enumerate(itertools.islice(itertools.cycle(paths), batch_size * num_batches)))
    chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    begin = time.perf_counter()
    pool.map(decode_chunk, chunks, chunksize=1)
    return time.perf_counter() - begin


def settle() -> float:
    """CPU seconds that all sides have used until they stand still."""
    main = psutil.Process()
    processes = [main, *main.children(recursive=True)]
    before = -1.0
    while True:
        used = sum(sum(process.cpu_times()[:2]) for process in processes)
        if used - before < 0.03:
            return used
        before = used
        time.sleep(0.3)


def measure(
    sides: dict[str, Callable[[], float]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and CPU seconds from standstill to standstill, per side and turn."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    busy: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sorted(sides, reverse=turn % 2 == 1):
            before = settle()
            seconds[side].append(sides[side]())
            busy[side].append(settle() - before)
    return seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="timed per side and turn")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--threads", action="store_true", help="ours in threads instead of processes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peer", default="torch", choices=("torch", "none"))
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, Pillow {Image.__version__}"
    if arguments.peer == "torch":
        import torch

        versions += f", PyTorch {torch.__version__}"
    print(f"{os.cpu_count()} cores, {versions}, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, batch, workers = Path(name), arguments.batch, arguments.workers
        draw_photographs(folder, arguments.images)
        paths = sorted(folder.glob("train/*/*.jpg"))
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            ours = our_batches(folder, batch, 0 if arguments.threads else workers)
            sides: dict[str, Callable[[], float]] = {
                "ours": functools.partial(take, ours, arguments.batches),
                "decoding alone": functools.partial(decode_alone, pool, paths, batch, arguments.batches),
            }
            if arguments.peer == "torch":
                theirs = torch_batches(paths, batch, workers)
                sides["PyTorch DataLoader"] = functools.partial(take, theirs, arguments.batches)
            for run in sides.values():  # starts the processes and fills the file cache
                run()
            seconds, busy = measure(sides, arguments.repeats)
            ours.close()  # ty: ignore[missing-attribute] (Grain's iterators have it)
    print("| side | CPU ms an image | images/s | ours / side |")
    print("|---|---|---|---|")
    for side, times in seconds.items():
        rate = batch * arguments.batches / statistics.median(times)
        # What a pipeline holds ready is taken before the clock starts, and made again after it stops.
        made = batch * (arguments.batches + (0 if side == "decoding alone" else _READY))
        cost = 1000 * statistics.median(busy[side]) / made
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["ours"], strict=True)]
        low, middle, high = quartiles(ratios)
        print(f"| {side} | {cost:.2f} | {rate:.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
