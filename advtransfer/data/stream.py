"""Training sets too large for the device's memory: batches that are decoded while training goes on.

A batch is a function of the seed and the step, and of nothing else (`read_batch`): which images it holds,
in which order, and the box that is cut out of each. So the step, which every checkpoint holds, is all of the
stream's state: a resumed run begins to decode at its own next step and sees what an undisturbed one would
have seen, whatever was under way when it was stopped and however many workers and processes there are. Grain
runs the function ahead of time, in worker processes or threads, and puts the batches into order.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np

from advtransfer import parallel
from advtransfer.data.decode import Encoded, decode_crop, decode_image, fit_image, reason
from advtransfer.data.recorded import Recording, find_training

_MAX_WORKERS = 32
_AHEAD = 2  # batches that lie on the device
_PLACES = 6  # batches that a worker has room for in shared memory
_SHARED_MEMORY = "/dev/shm"


class StreamedSplit(NamedTuple):
    """Images that are decoded whenever they are trained on."""

    read: Callable[[Sequence[int]], Sequence[tuple[Encoded, int]]]  # as in `Records`
    describe: Callable[[int], str]  # as in `Records`
    indices: np.ndarray  # integers [N], which of the records
    image_size: int  # pixels
    crop: bool  # see `fit_image`
    upright: bool  # see `decode_image`
    broken: str  # images that cannot be decoded: refuse | skip (the next one takes its place)

    @property
    def num_images(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the images that lie in memory."""
        return 0


def open_stream(recording: Recording, image_size: int, crop: bool, broken: str) -> StreamedSplit:
    """The images that `load_parts` would train on; none of them is read yet.

    Args:
      recording: a set on disk.
      image_size, crop: see `find_size`.
      broken: "refuse" or "skip".
    """
    records, indices = find_training(recording)
    return StreamedSplit(records.read, records.describe, indices, image_size, crop, recording.upright, broken)


class StreamOrder(NamedTuple):
    """What decides the batches of a split, of which each process reads its own rows."""

    seed: int
    batch_size: int  # over all processes
    process: int = 0
    num_processes: int = 1
    min_area: float = 0.0  # of a random box, see `random_box`; 0: the images whole, see `fit_image`


class HostBatch(NamedTuple):
    """One process's rows of a batch."""

    images: np.ndarray  # uint8 [n, H, W, 3]
    labels: np.ndarray  # int32 [n]
    skipped: tuple[str, ...]  # images that could not be decoded, with the reason


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of an epoch's images, integers [num_images]: each once."""
    return np.random.default_rng([seed, 0, epoch]).permutation(num_images)


def read_batch(split: StreamedSplit, order: StreamOrder, step: int) -> HostBatch:
    """This process's rows of the batch of a step; epochs drop the images that fill no batch.

    Raises:
      ValueError: an image cannot be decoded, unless `split.broken` is "skip".
    """
    epoch, i = divmod(step, split.num_images // order.batch_size)
    rows = order.batch_size // order.num_processes
    positions = range(order.process * rows, (order.process + 1) * rows)
    first = i * order.batch_size
    places = epoch_order(order.seed, epoch, split.num_images)[
        first + positions.start : first + positions.stop
    ]
    images = np.empty((rows, split.image_size, split.image_size, 3), np.uint8)
    labels, skipped = np.empty(rows, np.int32), []
    for row, example in enumerate(split.read(split.indices[places])):
        rng = np.random.default_rng([order.seed, 1, step, positions[row]])
        for place in range(places[row], places[row] + split.num_images):
            index = split.indices[place % split.num_images]
            encoded, label = example if place == places[row] else split.read([index])[0]
            try:
                images[row], labels[row] = _decode(split, encoded, rng, order.min_area), label
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


def _decode(split: StreamedSplit, encoded: Encoded, rng: np.random.Generator, min_area: float) -> np.ndarray:
    size, upright = split.image_size, split.upright
    if min_area:
        return np.asarray(decode_crop(encoded, size, rng, min_area=min_area, upright=upright))
    return np.asarray(fit_image(decode_image(encoded, upright=upright), size, crop=split.crop))


def iterate(
    split: StreamedSplit, order: StreamOrder, first_step: int, num_steps: int, *, num_workers: int
) -> Iterator[HostBatch]:
    """`read_batch` of `first_step` ... `num_steps - 1`, computed ahead; close() what comes back after use.

    Args:
      split, order: see `read_batch`.
      first_step, num_steps: which batches.
      num_workers: processes that decode, each a batch at a time; -1: one a core, at most 32;
        0: threads of this process, which start at once.

    Raises:
      ValueError: from `next`, as `read_batch`; or the batches outgrow the memory that processes share.
    """
    import grain  # takes a while, and most runs need it not

    cores = min(_num_cores(), _MAX_WORKERS)
    num_workers = cores if num_workers < 0 else num_workers
    threads = 0 if num_workers else cores
    batches = grain.MapDataset.source(_Batches(split, order, range(first_step, num_steps)))
    if num_workers:
        batches = batches.map(_Shelf())
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if num_workers:
        rows = order.batch_size // order.num_processes
        _check_shared_memory(num_workers * _PLACES * rows * split.image_size**2 * 3)
        _let_grain_read_its_flags()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        return _from_workers(ahead.mp_prefetch(options, worker_init_fn=_start_worker))
    return iter(ahead)


def _num_cores() -> int:
    """Cores that this process may use, where the system says it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A source of Grain whose examples are whole batches: nothing is done per image but to decode it."""

    split: StreamedSplit
    order: StreamOrder
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> HostBatch:
        return read_batch(self.split, self.order, self.steps[i])


class _Place(NamedTuple):
    """Where in shared memory the images of a batch lie."""

    name: str
    offset: int  # bytes, to the number of the turn; the images follow
    turn: int
    shape: tuple[int, ...]


class _Shelf:
    """Shared memory that a worker lays its images in, the same again and again.

    Grain would take new memory for each batch, which costs a tenth of the decoding: the system stops at every
    page of it. Of a worker's batches at most three are between the worker and the copy that `_from_workers`
    makes, so of `_PLACES` one is free; the turn that is written beside the images proves it.
    """

    def __init__(self):
        self._memory, self._turn = None, 0

    def __call__(self, batch: HostBatch) -> HostBatch:
        size = 8 + batch.images.nbytes
        if self._memory is None:
            self._memory = SharedMemory(create=True, size=_PLACES * size)
        place = _Place(self._memory.name, self._turn % _PLACES * size, self._turn, batch.images.shape)
        turn, images = _look(self._memory, place)
        turn[...], images[...] = self._turn, batch.images
        self._turn += 1
        return batch._replace(images=place, labels=batch.labels.tobytes())


def _from_workers(ahead: Any) -> Iterator[HostBatch]:
    """The batches of a Grain dataset whose workers have shelves."""
    memories, batches = {}, iter(ahead)
    try:
        for batch in batches:
            place = _Place(*batch.images)
            if place.name not in memories:
                memories[place.name] = SharedMemory(place.name)
                memories[place.name].unlink()  # it lives for as long as a process holds it
            turn, images = _look(memories[place.name], place)
            batch = batch._replace(images=images.copy(), labels=np.frombuffer(batch.labels, np.int32))
            if turn != place.turn:
                raise RuntimeError("a worker has written over a batch. Grain holds more of them than it did")
            del turn, images  # memory that is looked at cannot be closed
            yield batch
    finally:
        batches.close()
        for memory in memories.values():
            memory.close()


def _look(memory: SharedMemory, place: _Place) -> tuple[np.ndarray, np.ndarray]:
    """The number of the turn, int64 [], and the images, where they lie."""
    turn = np.ndarray((), np.int64, memory.buf, place.offset)
    return turn, np.ndarray(place.shape, np.uint8, memory.buf, place.offset + 8)


def _let_grain_read_its_flags() -> None:
    """Grain asks absl for settings of its own, which answers only where a command line was parsed: not in
    notebooks and tests. Grain's workers help themselves in the same way."""
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_"):
            flags.FLAGS[name].present = True


def _start_worker(index: int, num_workers: int) -> None:
    """Leaves signals to the main process, and ends the worker when that is gone, even by SIGKILL."""
    del index, num_workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def outlive() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=outlive, daemon=True).start()


def _check_shared_memory(needed: int) -> None:
    """A process that writes past the end of the shared memory is killed without a word."""
    if not os.path.isdir(_SHARED_MEMORY):
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"batches on their way from worker processes take {needed / 1e9:.1f} GB, {_SHARED_MEMORY} has "
            f"{free / 1e9:.1f} GB free: enlarge it (docker run --shm-size), or lower "
            "--config.train.num_workers (0: threads)"
        )


class LostWorker(RuntimeError):
    """A process that decodes images is gone; training can go on from its last checkpoint."""


class DeviceBatches:
    """Images and labels of a step as `parallel.split` shapes them, on the devices before they are needed.

    Steps are best asked for in turn; another one than the next begins anew there.
    """

    def __init__(self, split: StreamedSplit, order: StreamOrder, num_steps: int, *, num_workers: int):
        self._open = functools.partial(iterate, split, order, num_steps=num_steps, num_workers=num_workers)
        # A copy that is started and not waited for: the next batch travels while the devices compute.
        self._put = parallel.map_parallel(lambda images, labels: (images, labels), num_shared=0, num_split=2)
        self._iterator, self._next, self._ready = None, None, deque()
        self._last, self._said = num_steps, set()

    def __call__(self, step: int) -> tuple[Any, Any]:
        """Images uint8 [devices, n, H, W, 3] and labels int32 [devices, n].

        Raises:
          ValueError: as `iterate`.
          LostWorker: a worker was ended from outside, for want of memory, say.
        """
        if step != self._next:
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
            self._ready.append(self._put(*parallel.split_locally(arrays)))
        self._next = step + 1
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator, self._next = None, None
        self._ready.clear()

    def _say(self, skipped: tuple[str, ...]) -> None:
        for image in skipped:
            if image not in self._said:
                self._said.add(image)
                logging.warning("skipped: %s; %d broken images so far", image, len(self._said))
