"""Groups of a study, and the training of its sources, as tasks of a Ray cluster (https://docs.ray.io).

Nothing but this file knows Ray. Each worker has a device of the cluster for itself (a GPU, or a core) and
keeps its compiled programs and prepared inputs from group to group. Networks and images come to it by Ray,
and its rows go back to the process that asked, which writes them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import platform
import signal
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advtransfer import parallel, storage
from advtransfer.compilation import keep_programs
from advtransfer.data import Dataset, LostWorker
from advtransfer.foreign import AnyPath
from advtransfer.models import Model
from advtransfer.parallel import NoCluster
from advtransfer.study.run import GroupRunner, Groups, shared_inputs
from advtransfer.study.trials import Trial

_LOOK_EVERY = 5.0  # seconds, for devices that have joined
_MAX_LOSSES = 3  # of the same group, after which it is taken for the cause


class Cluster(NamedTuple):
    """A connection to a Ray cluster."""

    resources: Mapping[str, float]  # of a worker
    environment: Mapping[str, str]  # of a worker
    programs: Path | None  # where workers keep compiled programs

    @property
    def device(self) -> str:
        """What each worker has, in words."""
        return "a GPU" if "num_gpus" in self.resources else "a core"

    def num_workers(self) -> int:
        """How many workers fit into the cluster as it is now."""
        kind = "GPU" if "num_gpus" in self.resources else "CPU"
        return sum(int(node["Resources"].get(kind, 0)) for node in _nodes())


@contextlib.contextmanager
def connect(
    address: str, *, device: str = "auto", folder: AnyPath | None = None, programs: Path | None = None
) -> Generator[Cluster]:
    """A cluster whose nodes run the same Python, JAX and package as this process.

    Args:
      address: HOST:PORT of its head; "": that of RAY_ADDRESS or of this machine, or else a cluster of this
        machine alone, for as long as the context lasts.
      device: "gpu" or "core", what every worker has for itself; "auto": a GPU where the cluster has any.
      folder: that every node has to see; None: none.
      programs: where workers keep compiled programs; None: nowhere.

    Raises:
      NoCluster: nobody answers, a node runs something else, none has such a device, or one does not see
        `folder`.
    """
    try:
        ray = _ray()
    except ImportError:
        raise NoCluster("engine=ray: Ray is not installed: pip install 'advtransfer[ray]'") from None
    _knock(address or os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where, about = address or "this machine", _first_line(error)
        if "AuthenticationError" in str(error.__cause__):
            about = "it wants a token: set RAY_AUTH_MODE=token and copy its head's ~/.ray/auth_token here"
        raise NoCluster(f"Ray at {where}: {about}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own
        cluster = Cluster(*_choose(device), programs)
        _check(folder)
        yield cluster
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises a NoCluster where nobody listens; Ray would try for a minute or more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise NoCluster(
            f"no Ray cluster answers at {address} ({error}); `ray status` there shows its own"
        ) from error


def _ray() -> Any:
    """Ray, whose own annotations leave out most of what it takes."""
    return importlib.import_module("ray")


def _choose(device: str) -> tuple[dict[str, float], dict[str, str]]:
    has_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in _nodes())
    if device == "gpu" and not has_gpu:
        raise NoCluster(
            "no node of the Ray cluster has a GPU: take ray_device=core, or start nodes with --num-gpus"
        )
    if device == "gpu" or (device == "auto" and has_gpu):
        return {"num_gpus": 1, "num_cpus": 0}, {}
    if not any(node["Resources"].get("CPU", 0) >= 1 for node in _nodes()):
        raise NoCluster("no node of the Ray cluster has a CPU core to give: start nodes with --num-cpus")
    return {"num_cpus": 1}, {"JAX_PLATFORMS": "cpu", "NPROC": "1"}


def _nodes() -> list[dict[str, Any]]:
    ray = _ray()
    return [node for node in ray.nodes() if node["Alive"]]


def _check(folder: AnyPath | None) -> None:
    """Raises a NoCluster for a node that runs something else than this process, or does not see `folder`."""
    if folder is None or storage.is_address(folder):
        _ask_nodes(None, "")
        return
    is_new, token = not folder.exists(), uuid.uuid4().hex
    storage.make_folder(folder)
    seen = folder / f".seen-{token}"
    try:
        seen.write_text(token)
        _ask_nodes(seen, token)
    finally:
        seen.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _ask_nodes(seen: AnyPath | None, token: str) -> None:
    ray = _ray()
    affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    look = ray.remote(name="look", num_cpus=0, max_retries=0)(_look)
    for node in _nodes():
        where = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) of the Ray cluster"
        there = look.options(scheduling_strategy=affinity(node["NodeID"], soft=False))
        try:
            found, text = ray.get(there.remote(seen and str(seen.resolve())))
        except ray.exceptions.RayError as error:
            raise NoCluster(f"{where} cannot run this package: {_last_line(error)}") from error
        for name, version in _versions().items():
            if found.get(name) != version:
                raise NoCluster(f"{where} has {name} {found.get(name)}, this machine {version}")
        if seen and text != token:
            raise NoCluster(
                f"{where} does not see {seen.parent}: name a workdir on a file system that all nodes share, "
                "or in a bucket"
            )


def _look(path: str | None) -> tuple[dict[str, str], str | None]:
    """What a node runs, and what it reads in a file."""
    with contextlib.suppress(OSError):
        return _versions(), path and storage.to_path(path).read_text()
    return _versions(), None


def _versions() -> dict[str, str]:
    packages = ("advtransfer", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


class _Worker:
    """A process that runs groups on a device of its own."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[Trial]],
        models: Mapping[str, Model],
        datasets: Mapping[str, Dataset],
        programs: str | None,
    ):
        if programs:
            keep_programs(Path(programs))
        self._runner = GroupRunner(groups, models, datasets)

    def start(self) -> None:
        """Returns when the worker is there."""

    def run(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        return self._runner.run(trials)


class _Running(NamedTuple):
    worker: Any  # a Ray actor
    name: str  # of its group; "": it starts


class Tasks:
    """Groups that a cluster runs: an iterable of their names, as each is finished and written."""

    def __init__(self, groups: Groups, cluster: Cluster):
        self._groups, self._cluster = groups, cluster
        self._queue = list(groups.left)
        self._inputs = {name: shared_inputs(members[0]) for name, members in groups.all.items()}
        self._running: dict[Any, _Running] = {}
        self._losses: Counter[str] = Counter()

    def status(self) -> str:
        """How many groups run, and how many were lost with their node and started again."""
        running = sum(bool(task.name) for task in self._running.values())
        return f"{running} running, {sum(self._losses.values())} lost"

    def __iter__(self) -> Iterator[str]:
        ray = _ray()
        environment = {"env_vars": dict(self._cluster.environment)}
        worker = ray.remote(_Worker).options(**self._cluster.resources, runtime_env=environment)
        groups, programs = self._groups, self._cluster.programs
        shared = [ray.put(x) for x in (groups.all, groups.models, groups.datasets)]
        try:
            while self._queue or any(task.name for task in self._running.values()):
                for _ in range(min(self._cluster.num_workers() - len(self._running), len(self._queue))):
                    own = worker.remote(*shared, programs and str(programs))
                    self._running[own.start.options(name="start").remote()] = _Running(own, "")
                done, _ = ray.wait([*self._running], timeout=_LOOK_EVERY)
                for reference in done:
                    task = self._running.pop(reference)
                    try:
                        rows = ray.get(reference)
                    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                        self._lose(task.name, error)
                        continue
                    except ray.exceptions.RayTaskError as error:
                        raise _cause(error) from None
                    if self._queue:
                        self._submit(task.worker, task.name)
                    if task.name:
                        groups.write(task.name, rows)
                        yield task.name
        finally:
            for task in self._running.values():
                ray.kill(task.worker)

    def _submit(self, worker: Any, previous: str) -> None:
        """Gives a worker its next group: one whose prepared inputs it has, or else one that no other has."""
        inputs = self._inputs
        others = {inputs[task.name] for task in self._running.values() if task.name}
        alike = [name for name in self._queue if previous and inputs[name] == inputs[previous]]
        apart = [name for name in self._queue if inputs[name] not in others]
        name = [*alike, *apart, *self._queue][0]
        self._queue.remove(name)
        first = self._groups.missing[name][0]
        label = f"{first.source.name}, n = {first.num_train_images}, k = {first.num_unfrozen_blocks}"
        run = worker.run.options(name=f"{label}, {first.target}")
        self._running[run.remote(self._groups.missing[name])] = _Running(worker, name)

    def _lose(self, name: str, error: Exception) -> None:
        self._losses[name] += 1
        if self._losses[name] >= _MAX_LOSSES:
            doing = "ran the same group" if name else "started"
            raise LostWorker(
                f"a worker of the Ray cluster ended {_MAX_LOSSES} times while it {doing}: {_last_line(error)}"
            ) from error
        if name:
            self._queue.insert(0, name)
            logging.warning("a worker of the Ray cluster was lost; its group starts again")


def run_on(cluster: Cluster) -> Callable[[Groups], Tasks]:
    """An engine of `run_trials`."""
    return lambda groups: Tasks(groups, cluster)


def call_each(cluster: Cluster, function: Callable[..., Any], calls: Mapping[str, tuple]) -> Iterator[str]:
    """Calls `function` with the arguments of each call, and gives the name of each that is done: tasks that
    have a GPU each, or all cores of a node, and start again where their node is lost."""
    ray = _ray()
    resources = dict(cluster.resources)
    if "num_gpus" not in resources:
        resources["num_cpus"] = max(int(node["Resources"].get("CPU", 0)) for node in _nodes())
    environment = {name: value for name, value in cluster.environment.items() if name != "NPROC"}
    options = resources | {"runtime_env": {"env_vars": environment}, "max_retries": -1, "max_calls": 1}
    task = ray.remote(**options)(_call)
    running = {task.options(name=name).remote(function, args): name for name, args in calls.items()}
    try:
        while running:
            (done,), _ = ray.wait([*running])
            ray.get(done)
            yield running.pop(done)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _call(function: Callable[..., Any], args: tuple) -> None:
    parallel.one_device_per_core()
    function(*args)


def _cause(error: Any) -> Exception:
    """What a task has raised, as it was there."""
    return error.cause if isinstance(error.cause, Exception) else error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: Exception) -> str:
    return [type(error).__name__, *filter(str.strip, str(error).splitlines())][-1]
