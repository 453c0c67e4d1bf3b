"""Training sets too large for the device's memory: images are decoded during training.

A batch depends on the seed and the step alone (`read_batch`): which images it holds, in which order, and
which box is cut out of each. So the step, which every checkpoint holds, is the whole state of the stream: a
resumed run sees the batches of an uninterrupted one, with any number of workers and processes. Grain calls
the function ahead of time, in worker processes or threads, and returns the batches in order.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Array, Int32, Integer, UInt8

from advtransfer import parallel
from advtransfer.data.decode import Encoded, decode_crop, decode_image, fit_image, reason

if TYPE_CHECKING:
    import grain

_MAX_WORKERS = 32
_AHEAD = 2  # batches that are copied to the devices before they are needed
_IN_FLIGHT = 8  # batches per worker that may be in shared memory at once
_SHARED_MEMORY = "/dev/shm"


class StreamedSplit(NamedTuple):
    """Images that are decoded each time they are trained on."""

    read: Callable[[Iterable[SupportsIndex]], Sequence[tuple[Encoded, int]]]  # as in `Records`
    describe: Callable[[int], str]  # as in `Records`
    indices: Integer[np.ndarray, " n"]  # which of the records
    image_size: int  # pixels
    crop: bool  # see `fit_image`
    upright: bool  # see `decode_image`
    broken: str  # what to do with images that cannot be decoded: refuse | skip (the next one is used)

    @property
    def num_images(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the images in memory."""
        return 0


class StreamOrder(NamedTuple):
    """What determines the batches of a split; each process reads its own rows of them."""

    seed: int
    batch_size: int  # over all processes
    process: int = 0
    num_processes: int = 1
    min_area: float = 0.0  # of a random box, see `random_box`; 0: whole images, see `fit_image`


class HostBatch(NamedTuple):
    """One process's rows of a batch."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int32[np.ndarray, " n"]
    skipped: tuple[str, ...]  # images that could not be decoded, with the reason


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> Integer[np.ndarray, " {num_images}"]:
    """A permutation of the images for one epoch."""
    return np.random.default_rng([seed, 0, epoch]).permutation(num_images)


def read_batch(split: StreamedSplit, order: StreamOrder, step: int) -> HostBatch:
    """This process's rows of the batch of a step; epochs drop the images that fill no batch.

    Raises:
      ValueError: an image cannot be decoded, unless `split.broken` is "skip".
    """
    epoch, i = divmod(step, split.num_images // order.batch_size)
    rows, size = order.batch_size // order.num_processes, split.image_size
    first = order.process * rows  # of this process's places in the batch
    places = epoch_order(order.seed, epoch, split.num_images)[i * order.batch_size + first :][:rows]
    images = np.empty((rows, size, size, 3), np.uint8)
    labels, skipped = np.empty(rows, np.int32), []
    for row, example in enumerate(split.read(split.indices[places])):
        rng = np.random.default_rng([order.seed, 1, step, first + row])
        for place in range(places[row], places[row] + split.num_images):
            index = split.indices[place % split.num_images]
            encoded, label = example if place == places[row] else split.read([index])[0]
            try:
                if order.min_area:
                    image = decode_crop(encoded, size, rng, min_area=order.min_area, upright=split.upright)
                else:
                    image = fit_image(decode_image(encoded, upright=split.upright), size, crop=split.crop)
                images[row], labels[row] = image, label
                break
            except Exception as error:  # Pillow's readers raise almost anything for a damaged file
                skipped.append(f"{split.describe(index)} ({reason(error)})")
            if split.broken == "refuse":
                raise ValueError(
                    f"cannot decode {skipped[0]}: mend or remove it, or --config.broken_images=skip"
                )
        else:
            raise ValueError(f"not one image can be decoded: {skipped[0]}")
    return HostBatch(images, labels, tuple(skipped))


def iterate(
    split: StreamedSplit, order: StreamOrder, first_step: int, num_steps: int, *, num_workers: int
) -> grain.DatasetIterator[HostBatch]:
    """`read_batch` of `first_step` ... `num_steps - 1`, computed ahead of time; close the iterator after use.

    Args:
      split, order, first_step, num_steps: which batches.
      num_workers: processes that decode, one batch each at a time; -1: one per core, at most 32;
        0: threads of this process, which need no start-up time.

    Raises:
      ValueError: from `next`, as `read_batch`; or there is too little shared memory for the batches.
    """
    import grain  # slow to import, and needed by streamed sets alone

    cores = min(_num_cores(), _MAX_WORKERS)
    num_workers = cores if num_workers < 0 else num_workers
    threads = 0 if num_workers else cores
    batches = grain.MapDataset.source(_Batches(split, order, range(first_step, num_steps)))
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if num_workers:
        rows = order.batch_size // order.num_processes
        _check_shared_memory(num_workers * _IN_FLIGHT * rows * split.image_size**2 * 3)
        _let_grain_read_its_flags()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        ahead = ahead.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(ahead)


def _num_cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A Grain data source whose elements are whole batches, so that Grain does no work per image."""

    split: StreamedSplit
    order: StreamOrder
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> HostBatch:
        return read_batch(self.split, self.order, self.steps[index])


def _let_grain_read_its_flags() -> None:
    """Grain reads absl flags of its own, which fails where no command line was parsed, as in notebooks.
    Grain's own workers do the same."""
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_"):
            flags.FLAGS[name].present = True


def _start_worker(index: int, num_workers: int) -> None:
    """Leaves signals to the main process, and ends the worker with it, even after SIGKILL."""
    del index, num_workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()

    def outlive() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=outlive, daemon=True).start()


def _check_shared_memory(needed: int) -> None:
    """Raises a ValueError if too little is free: a process that exceeds it is killed without a message."""
    if not os.path.isdir(_SHARED_MEMORY):
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"worker processes take up to {needed / 1e9:.1f} GB of shared memory for batches, and "
            f"{_SHARED_MEMORY} has {free / 1e9:.1f} GB free: enlarge it (docker run --shm-size), or lower "
            "--config.train.num_workers (0: threads)"
        )


class LostWorker(RuntimeError):
    """A process that decodes images has ended; training can be resumed from its last checkpoint."""


class DeviceBatches:
    """Images and labels of each step, shaped as by `parallel.split`, on the devices ahead of time.

    Steps should be requested in order; any other step restarts the stream there.
    """

    def __init__(
        self,
        split: StreamedSplit,
        order: StreamOrder,
        num_steps: int,
        *,
        num_workers: int,
        devices: int | None = None,
    ):
        self._open = functools.partial(iterate, split, order, num_steps=num_steps, num_workers=num_workers)
        # The copy is asynchronous: the next batch is transferred while the devices compute.
        self._put = parallel.map_parallel(
            lambda images, labels: (images, labels), num_shared=0, num_split=2, devices=devices
        )
        self._devices = devices
        self._iterator: grain.DatasetIterator[HostBatch] | None = None
        self._next: int | None = None
        self._ready: deque[tuple[Array, Array]] = deque()
        self._last, self._said = num_steps, set[str]()

    def __call__(self, step: int) -> tuple[UInt8[Array, "devices n h w 3"], Int32[Array, "devices n"]]:
        """Images and labels.

        Raises:
          ValueError: as `iterate`.
          LostWorker: a worker was killed, for lack of memory, say.
        """
        if self._iterator is None or step != self._next:
            self.close()
            self._iterator = self._open(step)
        while len(self._ready) < min(_AHEAD, self._last - step):
            try:
                batch = next(self._iterator)
            except RuntimeError as error:
                why = str(error).partition(".")[0]
                raise LostWorker(f"a process that decodes images has ended ({why})") from error
            self._say(batch.skipped)
            arrays = np.asarray(batch.images), np.asarray(batch.labels)
            self._ready.append(self._put(*parallel.split_locally(arrays, self._devices)))
        self._next = step + 1
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = self._next = None
            self._ready.clear()
            gc.collect()  # Grain's iterators are reference cycles that hold shared memory

    def _say(self, skipped: tuple[str, ...]) -> None:
        for image in skipped:
            if image not in self._said:
                self._said.add(image)
                logging.warning("skipped: %s; %d broken images so far", image, len(self._said))
