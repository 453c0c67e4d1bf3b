"""Influence through the last layer, against dense Hessians, and against training without an image."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from advtransfer.analysis import head_hessian, influence, krylov

SOLVERS = ("damped", "truncated", "cg")
# Images, queries, features, classes: more images than features, fewer, two classes, one query.
SHAPES = [(30, 20, 5, 3), (6, 9, 8, 4), (40, 25, 7, 2), (5, 1, 3, 3)]


def make_problem(num_train, num_queries, num_features, num_classes, scale=1.0):
    rng = np.random.default_rng([num_train, num_features])
    features = [rng.standard_normal((n, num_features)).astype(np.float32) for n in (num_train, num_queries)]
    labels = [rng.integers(0, num_classes, n) for n in (num_train, num_queries)]
    kernel = (scale * rng.standard_normal((num_features, num_classes))).astype(np.float32)
    bias = rng.standard_normal(num_classes).astype(np.float32)
    return features[0], labels[0], features[1], labels[1], kernel, bias


def score(arrays, **options):
    return influence.last_layer_scores(*arrays, **{"tell": lambda line: None, **options})


def derivatives(arrays):
    """H, the training gradients and the queries', by JAX's differentiation in float64."""
    with jax.enable_x64(True):
        train, labels, queries, query_labels, kernel, bias = (jnp.asarray(x) for x in arrays)
        flat = jnp.concatenate([kernel, bias[None]]).astype(jnp.float64).ravel()

        def loss(flat, image, label):
            weights = flat.reshape(-1, len(bias))
            return -jax.nn.log_softmax(image.astype(jnp.float64) @ weights[:-1] + weights[-1])[label]

        gradient = jax.vmap(jax.grad(loss), (None, 0, 0))
        hessian = jax.vmap(jax.hessian(loss), (None, 0, 0))(flat, train, labels).sum(axis=0)
        return (
            np.asarray(hessian),
            np.asarray(gradient(flat, train, labels)),
            np.asarray(gradient(flat, queries, query_labels)),
        )


def kron_hessian(arrays):
    """H written out as a sum of Kronecker products."""
    features, _, _, _, kernel, bias = arrays
    total = 0
    for f in features.astype(np.float64):
        odds = np.exp(f @ kernel.astype(np.float64) + bias)
        p = odds / odds.sum()
        extended = np.append(f, 1)
        total = total + np.kron(np.outer(extended, extended), np.diag(p) - np.outer(p, p))
    return total


def worst(found, truth):
    return np.max(np.abs(found - truth)) / np.max(np.abs(truth))


@pytest.mark.parametrize("shape", SHAPES)
def test_damped_and_cg_are_the_dense_inverse(shape):
    arrays = make_problem(*shape)
    hessian, train, queries = derivatives(arrays)
    assert worst(kron_hessian(arrays), hessian) < 1e-13
    for damping in (1e-3, 1.0):
        truth = queries @ np.linalg.solve(hessian + damping * np.eye(len(hessian)), train.T)
        assert worst(score(arrays, solver="damped", damping=damping), truth) < 1e-10
        assert worst(score(arrays, solver="cg", damping=damping, tolerance=1e-11), truth) < 1e-8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rcond", [0.3, 0.05, 1e-3])
def test_truncated_is_the_pseudo_inverse(shape, rcond):
    arrays = make_problem(*shape)
    hessian, train, queries = derivatives(arrays)
    inverse = np.linalg.pinv(hessian, rcond=rcond, hermitian=True)
    found = score(arrays, solver="truncated", rcond=rcond)
    assert worst(found, queries @ inverse @ train.T) < 1e-8

    values, vectors = np.linalg.eigh(hessian)
    vectors = vectors[:, values > rcond * values[-1]]
    damped = vectors / (values[values > rcond * values[-1]] + 0.7) @ vectors.T
    assert (
        worst(score(arrays, solver="truncated", rcond=rcond, damping=0.7), queries @ damped @ train.T) < 1e-8
    )


def test_defaults_are_the_papers():
    arrays = make_problem(*SHAPES[0])
    np.testing.assert_array_equal(score(arrays), score(arrays, solver="damped", damping=30 * 5e-4))
    np.testing.assert_array_equal(score(arrays, solver="cg"), score(arrays, solver="cg", damping=30 * 5e-4))
    explicit = score(arrays, solver="truncated", damping=0.0, rcond=0.05)
    np.testing.assert_array_equal(score(arrays, solver="truncated"), explicit)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scores_follow_their_images_and_do_not_depend_on_blocks(solver, monkeypatch):
    arrays = make_problem(30, 40, 6, 3)
    scores = score(arrays, solver=solver, damping=0.1)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(40), rng.permutation(30)
    shuffled = (arrays[0][columns], arrays[1][columns], arrays[2][rows], arrays[3][rows], *arrays[4:])
    assert worst(score(shuffled, solver=solver, damping=0.1), scores[rows][:, columns]) < 1e-9
    part = (
        *arrays[:2],
        arrays[2][:7],
        arrays[3][:7],
        *arrays[4:],
    )  # fewer than images: the other side is solved
    assert worst(score(part, solver=solver, damping=0.1), scores[:7]) < 1e-9
    monkeypatch.setattr(influence, "_BLOCK", 7)
    monkeypatch.setattr(head_hessian, "_BLOCK", 11)
    assert worst(score(arrays, solver=solver, damping=0.1), scores) < 1e-9


def test_solvers_agree_at_a_size_that_takes_iterations():
    """248 parameters; the cut-off is too low to cut, so the pseudo-inverse has the damping alone."""
    arrays = make_problem(200, 50, 30, 8, scale=0.3)
    damped = score(arrays, solver="damped", damping=0.2)
    assert worst(score(arrays, solver="cg", damping=0.2), damped) < 1e-7
    assert worst(score(arrays, solver="truncated", damping=0.2, rcond=1e-7), damped) < 1e-7


def test_confident_predictions_keep_their_digits():
    """Two classes 40 apart: 1 - p is 4e-18, which 1 minus p cannot hold."""
    features, labels = np.array([[1.0]]), np.array([0])
    kernel, bias = np.array([[40.0, 0.0]]), np.zeros(2)
    one = head_hessian.make_examples(features, labels, kernel, bias, None)
    small = 1 / (1 + np.exp(40.0))
    np.testing.assert_allclose(one.residuals, [[-small, small]], rtol=1e-12)
    product = head_hessian.hessian_product(np.array([[[3.0, 0.0], [1.0, 0.0]]]), one)
    np.testing.assert_allclose(product, [[[2 * small] * 2, [-2 * small] * 2]], rtol=1e-12)
    np.testing.assert_allclose(head_hessian.hessian_diagonal(one), np.full((2, 2), small), rtol=1e-12)
    np.testing.assert_allclose(head_hessian.dense_hessian(one, 0.0), np.full((2, 2), small), rtol=1e-12)


def newton(features, labels, num_classes, decay, start):
    """The minimum of the summed loss + decay / 2 ‖θ‖², flat [(D + 1) C], to a gradient of 1e-10."""
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    flat, onehot = start, np.eye(num_classes)[labels]
    for _ in range(30):
        odds = np.exp(features @ flat.reshape(-1, num_classes))
        p = odds / odds.sum(axis=1, keepdims=True)
        gradient = (features.T @ (p - onehot)).ravel() + decay * flat
        if np.linalg.norm(gradient) < 1e-10:
            return flat
        softmax = p[:, :, None] * np.eye(num_classes) - p[:, :, None] * p[:, None]
        hessian = np.einsum("nd,ne,nab->daeb", features, features, softmax).reshape(len(flat), -1)
        flat = flat - np.linalg.solve(hessian + decay * np.eye(len(flat)), gradient)
    raise AssertionError("Newton's method did not converge")


def test_scores_are_the_rise_of_the_loss_without_an_image():
    """Of a converged head: retrained once without each of 60 images, the losses of 12 queries."""
    rng = np.random.default_rng(0)
    means = 1.5 * rng.standard_normal((3, 5))
    labels = rng.integers(0, 3, 72)
    features = means[labels] + rng.standard_normal((72, 5))
    train, queries, decay = slice(60), slice(60, None), 1.0
    fit = newton(features[train], labels[train], 3, decay, np.zeros(18))

    def losses(flat):
        logits = features[queries] @ flat.reshape(6, 3)[:-1] + flat[-3:]
        return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(12), labels[queries]]

    without = [
        newton(*(np.delete(x[train], i, axis=0) for x in (features, labels)), 3, decay, fit)
        for i in range(60)
    ]
    truth = np.stack([losses(flat) for flat in without], axis=1) - losses(fit)[:, None]
    head = fit.reshape(6, 3)
    arrays = (features[train], labels[train], features[queries], labels[queries], head[:-1], head[-1])
    scores = score(arrays, damping=decay)
    for found, change in zip(scores, truth, strict=True):
        assert scipy.stats.spearmanr(found, change).statistic > 0.95
    assert np.corrcoef(scores.ravel(), truth.ravel())[0, 1] > 0.95


EIGENVALUES = {
    "forty copies": np.concatenate([[10], np.ones(40), np.linspace(0.01, 0.4, 100)]),
    "a dense spectrum": np.linspace(0, 1, 200),
    "copies either side of the cut-off": np.concatenate([[1], np.full(17, 0.0501), np.full(30, 0.0499)]),
    "the identity": np.ones(300),
    "rank one": np.ones(1),
    "zero": np.zeros(1),
}


@pytest.mark.parametrize("name", EIGENVALUES)
def test_every_eigenvalue_above_the_cut_off_is_found(name):
    rng = np.random.default_rng(0)
    values = np.zeros(300)
    values[: len(EIGENVALUES[name])] = EIGENVALUES[name]
    rotation = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    matrix = (rotation * values) @ rotation.T
    found, vectors = krylov.leading_eigenpairs(lambda x: x @ matrix, 300, rcond=0.05, max_vectors=300)
    above = values > 0.05 * values.max()
    np.testing.assert_allclose(found, np.sort(values[above])[::-1], atol=1e-12 * values.max())
    np.testing.assert_allclose(vectors.T @ vectors, rotation[:, above] @ rotation[:, above].T, atol=1e-6)


def test_iterative_solvers_say_when_they_fail(monkeypatch):
    arrays = make_problem(400, 5, 59, 10)
    matrix = np.diag(np.linspace(0, 1, 300))
    with pytest.raises(RuntimeError, match="40 vectors, for which there is memory, do not settle"):
        krylov.leading_eigenpairs(lambda x: x @ matrix, 300, rcond=0.05, max_vectors=40)
    monkeypatch.setattr(influence, "_MAX_ITERATIONS", 2)
    with pytest.raises(RuntimeError, match="after 2 iterations of 2: raise damping or tolerance"):
        score(arrays, solver="cg", damping=1e-6)


def test_conjugate_gradients_say_how_far_they_came():
    """One step from 0 on diag(1, 2, 4) leaves 4/7, 1/7, -5/7 of ones; the other right sides are solved."""
    matrix, targets = np.diag([1.0, 2.0, 4.0]), np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    worst = np.sqrt(42 / 49 / 3)
    with pytest.raises(
        RuntimeError, match=f"relative residual of {worst:.1e}, not 1.0e-09, after 1 iterations"
    ):
        krylov.conjugate_gradients(lambda x: x @ matrix, targets, tolerance=1e-9, max_iterations=1)
    found = krylov.conjugate_gradients(lambda x: x @ matrix, targets, tolerance=1e-9, max_iterations=3)
    np.testing.assert_allclose(found, targets / [1, 2, 4], atol=1e-12)
    rough = krylov.conjugate_gradients(lambda x: x @ matrix, targets, tolerance=0.6, max_iterations=3)
    np.testing.assert_allclose(rough, [[3 / 7] * 3, [0] * 3, [0, 1.5, 0]])  # that is near enough for 0.6


def test_as_many_vectors_may_be_kept_as_there_is_room_for(monkeypatch):
    arrays, asked = make_problem(*SHAPES[0]), []
    search = krylov.leading_eigenpairs

    def kept(operator, size, *, rcond, max_vectors):
        asked.append(max_vectors)
        return search(operator, size, rcond=rcond, max_vectors=size)

    monkeypatch.setattr(krylov, "leading_eigenpairs", kept)
    monkeypatch.setattr(influence, "_TYPICAL_VECTORS", 2)
    price = influence.cost(30, 20, 5, 3, solver="truncated")
    for spare, number in ((0, 2), (32 * 18 * 3 - 1, 4), (32 * 18 * 3, 5), (10**6, 18)):
        memory = type("Memory", (), {"available": price.num_bytes + spare})
        monkeypatch.setattr(influence.psutil, "virtual_memory", lambda memory=memory: memory)
        score(arrays, solver="truncated")
        assert asked[-1] == number


def test_time_and_memory_are_reported_first_and_what_does_not_fit_is_refused(monkeypatch):
    lines = []
    arrays = make_problem(*SHAPES[0])
    score(arrays, solver="truncated", tell=lines.append)
    hessian = derivatives(arrays)[0]
    above = np.sum(np.linalg.eigvalsh(hessian) > 0.05 * np.linalg.eigvalsh(hessian)[-1])
    assert "20 queries of 30 training images, solver truncated, 18 parameters: about 0 s" in lines[0]
    assert lines[1] == f"{above} eigenvalues of H lie above 0.05 of the largest"

    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(influence.psutil, "virtual_memory", lambda: memory)
    for solver, advice in [("damped", "use solver='cg'"), ("cg", "score fewer images at a time")]:
        with pytest.raises(ValueError, match=f"solver='{solver}' does not fit .* free: {advice}"):
            score(arrays, solver=solver, tell=lines.append)
    assert len(lines) == 4


def test_the_dense_solver_costs_what_its_matrix_does():
    """The paper's size, and one whose features span less; operations of the three steps by hand."""
    size = 9 * 2049
    price = influence.cost(3200, 10000, 2048, 10, solver="damped")
    assert price.num_parameters == 20490
    assert 8 * size**2 < price.num_bytes < 8 * size**2 + 2e9
    flops = 45 * 3200 * 2049**2 + size**3 / 3 + 2 * 3200 * size**2 + 2 * 3200 * 10000 * size
    assert abs(price.flops / flops - 1) < 0.1
    small = influence.cost(100, 10000, 2048, 10, solver="damped")
    assert small.flops < influence.cost(100, 10000, 99, 10, solver="damped").flops * 1.01
    assert influence.cost(3200, 100, 2048, 1000, solver="damped").num_bytes > 1e13
    assert influence.cost(3200, 100, 2048, 1000, solver="cg").num_bytes < 1e10
    # A few hundred eigenvectors, however many parameters there are.
    assert influence.cost(3200, 10000, 2048, 10, solver="truncated").num_bytes < 2e9


def test_costs_are_those_of_the_arrays_and_products():
    """50 training images and 40 queries of 20 features and 3 classes; then few images of many features."""
    examples, scores, block = 90 * (21 + 21 + 4 * 3), 2 * 50 * 40, 8 * 63 * 40
    products = 2 * 40 * 50 * 63
    for solver, flops, numbers in (
        ("damped", 50 * 21 * 42 * 3 / 2 + 42**3 / 3 + 2 * 40 * 42**2 + products, 42**2),
        (
            "truncated",
            63 * (4 * 50 * 63 + 4 * 63 * 63 + 2 * 90 * 63) + 2 * 63 * 50 * 40,
            2 * 63 * (63 + 90),
        ),
        ("cg", 40 * 100 * 4 * 50 * 63 + products, 50 * 21 + 2 * 21**2),
    ):
        price = influence.cost(50, 40, 20, 3, solver=solver)
        assert price.num_parameters == 63 and price.flops == pytest.approx(flops)
        assert price.num_bytes == 8 * (examples + scores + numbers + block)
        swapped = influence.cost(40, 50, 20, 3, solver=solver)
        assert (
            swapped.num_bytes - 8 * (examples + scores + block)
            == 8
            * {
                "damped": 42**2,
                "truncated": 2 * 63 * (63 + 90),
                "cg": 40 * 21 + 2 * 21**2,
            }[solver]
        )
    few = influence.cost(5, 4, 20, 3, solver="damped")  # in the space of five images
    assert few.num_parameters == 63
    assert few.num_bytes == 8 * (9 * (5 + 21 + 4 * 3) + 2 * 5 * 4 + 10**2 + 8 * 15 * 4)
    many = influence.cost(3200, 10000, 2048, 10, solver="truncated")
    assert many.flops == pytest.approx(
        500 * (4 * 3200 * 20490 + 4 * 500 * 20490 + 2 * 13200 * 20490) + 2 * 500 * 3200 * 10000
    )


def test_right_sides_are_solved_for_in_blocks_that_fit():
    """At most 256, and 1 GiB for eight copies of float64."""
    for number, size, expected in (
        (3, 10, 3),
        (300, 10, 256),
        (300, 2**20, 16),
        (300, 2**20 + 1, 15),
        (5, 2**30, 1),
    ):
        assert influence._block(number, size) == expected


def test_a_problem_that_just_fits_is_solved(monkeypatch):
    arrays = make_problem(*SHAPES[0])
    price = influence.cost(30, 20, 5, 3, solver="damped")
    for spare, fits in ((0, True), (-1, False)):
        memory = type("Memory", (), {"available": price.num_bytes + spare})
        monkeypatch.setattr(influence.psutil, "virtual_memory", lambda memory=memory: memory)
        if fits:
            assert score(arrays).shape == (20, 30)
        else:
            with pytest.raises(ValueError, match="does not fit"):
                score(arrays)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solver": "dampd"}, "unknown solver 'dampd'; nearest: damped"),
        ({"damping": 0.0}, "damping is 0.0: H is singular, so solver='damped' needs"),
        ({"damping": 0.0, "solver": "cg"}, "damping is 0.0: H is singular, so solver='cg' needs"),
        (
            {0: np.ones((30, 5)), "damping": 1e-300},
            "H with its damping is singular to float64: choose a larger damping",
        ),
        ({"damping": -1.0, "solver": "truncated"}, "damping is -1.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"rcond": 0.0, "solver": "truncated"}, "rcond is 0.0: pass a number between 0 and 1"),
        ({"rcond": 1.0, "solver": "truncated"}, "rcond is 1.0"),
        ({"damping": float("inf")}, "damping is inf"),
        ({4: np.ones((5, 1)), 5: np.ones(1)}, "kernel has shape .5, 1.: pass"),
        ({5: np.full(3, np.inf)}, "bias holds NaN or infinity"),
        ({0: np.ones((30, 4))}, "train_features has shape .30, 4.: the kernel asks for .N, 5., N > 0"),
        ({2: np.ones((0, 5))}, "query_features has shape .0, 5."),
        ({1: np.zeros(29, int)}, "train_labels are int64 .29,.: pass 30 integers"),
        ({3: np.zeros(20)}, "query_labels are float64 .20,.: pass 20 integers"),
        ({3: np.full(20, 3)}, "query_labels run from 3 to 3: the head has the classes 0 to 2"),
        ({1: np.full(30, -1)}, "train_labels run from -1 to -1"),
        ({4: np.ones(5)}, "kernel has shape .5,.: pass .D, C. with two classes or more"),
        ({5: np.ones(4)}, "bias has shape .4,.: the kernel's classes ask for .3,."),
        ({0: np.full((30, 5), np.nan)}, "train_features holds NaN or infinity"),
    ],
)
def test_bad_input_is_named(change, message):
    arrays = list(make_problem(*SHAPES[0]))
    for place in [key for key in change if isinstance(key, int)]:
        arrays[place] = change.pop(place)
    with pytest.raises(ValueError, match=message):
        score(arrays, **change)


def test_seconds_are_operations_at_the_speed_of_a_product(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(influence.time, "perf_counter", lambda: next(clock))
    price = influence.cost(100, 10, 20, 3, solver="damped")
    assert influence.expected_seconds(price) == pytest.approx(price.flops * 2.0 / (2 * 1024**3))


def test_a_head_that_is_certain_has_no_influence_to_speak_of():
    train, _, queries, _, kernel, bias = make_problem(30, 5, 4, 3)
    certain = np.argmax(train @ kernel + bias, 1), np.argmax(queries @ kernel + bias, 1)
    problem = (train, certain[0], queries, certain[1], 1e6 * kernel, 1e6 * bias)
    with pytest.raises(ValueError, match="certain of the labels of all training images") as error:
        score(problem)
    assert "\n" not in str(error.value)
    mistaken = (certain[0] + (np.arange(30) == 3)) % 3
    with pytest.raises(ValueError, match="certain of the labels of all queries"):
        score((train, mistaken, *problem[2:]))


def test_a_kernel_by_classes_is_to_be_transposed():
    *arrays, kernel, bias = make_problem(30, 5, 4, 3)
    with pytest.raises(ValueError, match=r"\[C, D\]: transpose it"):
        score((*arrays, kernel.T, bias))


def test_it_prints_nothing_by_default(capfd):
    influence.last_layer_scores(*make_problem(6, 2, 3, 2))
    assert capfd.readouterr() == ("", "")


# --- factorising ----------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", [1, 7, 32, 50, 100])
def test_a_factor_by_panels(panel):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(50, 60))
    matrix = np.asfortranarray(np.tril(root @ root.T))
    factor = head_hessian.factorise(matrix, panel=panel)
    assert factor is matrix
    np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(root @ root.T), rtol=1e-9, atol=1e-9)
    indefinite = np.asfortranarray(np.diag(np.float64([1] * 40 + [-1] + [1] * 9)))
    with pytest.raises(ValueError, match="singular to float64: choose a larger damping"):
        head_hessian.factorise(indefinite, panel=panel)


CPU = Path("/proc/cpuinfo")
LARGE = """
import numpy as np
from scipy.linalg.blas import dtrmv
from advtransfer.analysis.head_hessian import factorise

n, rng = 16_500, np.random.default_rng(0)
v, x = rng.normal(size=(2, n))
matrix = np.empty((n, n), order="F")
for i in range(0, n, 512):
    matrix[:, i : i + 512] = np.outer(v, v[i : i + 512])
matrix[np.diag_indices(n)] += n
want = v * (v @ x) + n * x
factor = factorise(matrix)
found = dtrmv(factor, dtrmv(factor, x, lower=1, trans=1), lower=1)
print(np.max(np.abs(found - want)) / np.max(np.abs(want)))
"""


@pytest.mark.sweep
@pytest.mark.skipif(
    not CPU.exists() or "avx512f" not in CPU.read_text(),
    reason="the processor has no avx512f, so OpenBLAS would not run the kernels that crash",
)
def test_a_large_factor_with_the_kernels_that_crash():
    environment = os.environ | {"OPENBLAS_CORETYPE": "SkylakeX", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 1e-10
