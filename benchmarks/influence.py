"""Seconds and peak memory of last-layer influence at the size of Utrera et al. (2021, section 5).

    python -m benchmarks.influence [--solvers=damped,truncated] [--train=3200] [--queries=10000] [--turns=2]

Features are made, not measured: 2,048 non-negative numbers, `relu` of 512 latent ones whose standard
deviation falls as k^-1/2 around a mean for each class; 44 % are zero, the mean is 0.45. The head is trained
on them by L-BFGS with the paper's weight decay. Every solver and turn runs in a process of its own; `peak` is
its largest resident memory, features and scores included. CPU seconds count both cores, waiting in BLAS too.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import scipy
import scipy.optimize
import scipy.special

from advtransfer.analysis import influence

LATENT = 512


class Problem(NamedTuple):
    """The arguments of `last_layer_scores`."""

    train_features: np.ndarray
    train_labels: np.ndarray
    query_features: np.ndarray
    query_labels: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray


def make_problem(num_train: int, num_queries: int, num_features: int, num_classes: int) -> Problem:
    """The same in every process."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, LATENT + 1) ** -0.5
    means = 0.2 * spectrum * rng.standard_normal((num_classes, LATENT))
    mixing = rng.standard_normal((LATENT, num_features)) / np.linalg.norm(spectrum)
    labels = rng.integers(0, num_classes, num_train + num_queries)
    latent = means[labels] + spectrum * rng.standard_normal((len(labels), LATENT))
    features = np.maximum(latent @ mixing + 0.15, 0)
    features = (features * (0.45 / features.mean())).astype(np.float32)
    train, queries = slice(num_train), slice(num_train, None)
    head = train_head(features[train], labels[train], num_classes)
    return Problem(features[train], labels[train], features[queries], labels[queries], *head)


def train_head(features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The minimum of the mean cross-entropy with the paper's weight decay, nearly."""
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
    onehot = np.eye(num_classes)[labels]

    def loss_and_gradient(flat):
        weights = flat.reshape(-1, num_classes)
        log_probs = scipy.special.log_softmax(features @ weights, axis=1)
        gradient = features.T @ (np.exp(log_probs) - onehot) / len(features)
        loss = -np.mean(np.sum(log_probs * onehot, axis=1)) + influence.WEIGHT_DECAY / 2 * flat @ flat
        return loss, (gradient + influence.WEIGHT_DECAY * weights).ravel()

    start = np.zeros(features.shape[1] * num_classes)
    found = scipy.optimize.minimize(
        loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}
    )
    weights = found.x.reshape(-1, num_classes).astype(np.float32)
    return weights[:-1], weights[-1]


def run(arguments: argparse.Namespace, solver: str) -> None:
    problem = make_problem(arguments.train, arguments.queries, arguments.features, arguments.classes)
    accuracy = np.mean(
        np.argmax(problem.query_features @ problem.kernel + problem.bias, 1) == problem.query_labels
    )
    lines = []
    begin, busy = time.perf_counter(), time.process_time()
    scores = influence.last_layer_scores(*problem, solver=solver, tell=lines.append)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    assert scores.shape == (arguments.queries, arguments.train) and np.all(np.isfinite(scores))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(*lines, sep="\n")
    top = problem.train_labels[np.argmax(scores, axis=1)] == problem.query_labels
    print(
        f"| {solver} | {seconds:.1f} | {busy:.1f} | {peak / 1e9:.2f} | {accuracy:.3f} | {top.mean():.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--solvers", default="damped,truncated")
    parser.add_argument("--train", type=int, default=3200)
    parser.add_argument("--queries", type=int, default=10000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--in-process", help="one solver, here and now")
    arguments = parser.parse_args()
    if arguments.in_process:
        return run(arguments, arguments.in_process)
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    print(f"{os.cpu_count()} cores, {versions}, load {os.getloadavg()[0]:.1f} before the start")
    print("| solver | seconds | CPU seconds | peak GB | query accuracy | top-1 match |")
    print("|---|---|---|---|---|---|", flush=True)
    for _ in range(arguments.turns):
        for solver in arguments.solvers.split(","):
            command = [sys.executable, "-m", "benchmarks.influence", *sys.argv[1:], "--in-process", solver]
            subprocess.run(command, check=True)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
