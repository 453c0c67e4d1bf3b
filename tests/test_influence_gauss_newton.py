"""Influence through residual blocks, against the Gauss-Newton matrix written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from advtransfer.analysis import gauss_newton, influence
from advtransfer.models import Model, ModelSpec, ResNet, init_variables

pytestmark = pytest.mark.usefixtures("unoptimised")

SIZE, CLASSES = 6, 3
DAMPING = 5.0  # G's largest eigenvalue is 980


@pytest.fixture(scope="module")
def model():
    """Two blocks of 4 and 8 channels, with statistics and scales that are not their defaults."""
    module = ResNet(stage_sizes=(1, 1), bottleneck=False, num_classes=CLASSES, cifar_stem=True, width=4)
    key = jax.random.key(0)
    variables = init_variables(module, key, SIZE)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    moved = [
        x * jax.random.uniform(k, x.shape, minval=0.5, maxval=2) for x, k in zip(leaves, keys, strict=True)
    ]
    variables = jax.tree.unflatten(tree, moved)
    variables["params"]["fc"]["kernel"] *= 0.05  # so that most images are undecided
    spec = ModelSpec("resnet_tiny", CLASSES, SIZE, module.mean, module.std)
    return Model(module, variables, spec)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    draw = {n: rng.random((n, SIZE, SIZE, 3), np.float32) for n in (14, 5)}
    return draw[14], rng.integers(0, CLASSES, 14), draw[5], rng.integers(0, CLASSES, 5)


def _trained_names(model, k):
    names = model.module.block_names
    return list(model.variables["params"]) if k == -1 else [*names[len(names) - k :], "fc"]


def dense_scores(model, k, arrays, damping):
    """From Jacobians of the whole network by reverse mode, and G as a matrix."""
    params = model.variables["params"]
    flat, unravel = ravel_pytree({name: params[name] for name in _trained_names(model, k)})

    @jax.jit
    def apply(flat, images):
        variables = {"params": {**params, **unravel(flat)}, "batch_stats": model.variables["batch_stats"]}
        return model.module.apply(variables, images)

    jacobian_of = jax.jit(jax.jacrev(apply))

    def parts(images, labels):
        jacobians = np.float64(jacobian_of(flat, images))
        logits = np.float64(apply(flat, images))
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        residuals = probabilities - np.eye(CLASSES)[labels]
        return jacobians, probabilities, np.einsum("nc,ncp->np", residuals, jacobians)

    jacobians, probabilities, train = parts(*arrays[:2])
    matrix = damping * np.eye(flat.size)
    for jacobian, p in zip(jacobians, probabilities, strict=True):
        matrix += jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    return parts(*arrays[2:])[2] @ np.linalg.solve(matrix, train.T)


def block_scores(model, k, arrays, **options):
    options = {"damping": DAMPING, "tolerance": 1e-5, "tell": lambda line: None, "batch_size": 4, **options}
    return gauss_newton.block_scores(model, k, *arrays, **options)


def worst(found, truth):
    return np.max(np.abs(found - truth)) / np.max(np.abs(truth))


@pytest.mark.parametrize("k", [1, -1])
def test_scores_are_those_of_the_dense_matrix(model, images, k):
    truth, lines = dense_scores(model, k, images, DAMPING), []
    found = block_scores(model, k, images, query_batch_size=2, tell=lines.append)
    assert "5 queries of 14 training images" in lines[0] and lines[0].endswith("3 systems of 2 right sides")
    assert [line.startswith("the first of them took") for line in lines] == [False, True]
    assert found.shape == truth.shape == (5, 14)
    assert worst(found, truth) < 5e-5


def test_more_queries_than_training_images_are_solved_for_from_the_other_side(model, images):
    turned = (*images[2:], *images[:2])
    assert worst(block_scores(model, 0, turned), dense_scores(model, 0, turned, DAMPING)) < 5e-5


def test_scores_do_not_depend_on_the_batches(model, images):
    whole = block_scores(model, 0, images, batch_size=64)
    assert worst(block_scores(model, 0, images, batch_size=3, query_batch_size=4), whole) < 5e-5


def test_the_head_alone_has_the_scores_of_the_last_layer(model, images):
    apply = model.module.apply
    features = [apply(model.variables, x, stop=model.module.num_blocks) for x in (images[0], images[2])]
    head = model.variables["params"]["fc"]
    truth = influence.last_layer_scores(
        features[0], images[1], features[1], images[3], head["kernel"], head["bias"], damping=DAMPING
    )
    assert worst(block_scores(model, 0, images), truth) < 5e-5


def test_a_compute_type_of_bfloat16_changes_nothing(model, images):
    rough = model._replace(module=model.module.clone(dtype=jnp.bfloat16))
    np.testing.assert_array_equal(
        block_scores(rough, 1, images, query_batch_size=2), block_scores(model, 1, images, query_batch_size=2)
    )


def test_blocks_are_counted_from_the_head(model):
    first = gauss_newton._first_trained_block
    assert [first(model.module, k) for k in (0, 1, 2, -1)] == [2, 1, 0, None]


def test_bad_input_is_named(model, images):
    train_images, train_labels, *queries = images
    for options, message in [
        ({"k": 3}, "num_unfrozen_blocks is 3: this network has 2 blocks"),
        ({"k": -2}, "num_unfrozen_blocks is -2"),
        ({"damping": 0.0}, "damping is 0.0: G is singular"),
        ({"damping": np.inf}, "damping is inf"),
        ({"labels": train_labels - 1}, "train_labels run from -1 to 1"),
        ({"labels": train_labels[:-1]}, "train_labels are int64 .13,.: pass one integer"),
        ({"labels": train_labels + 1}, "train_labels run from 1 to 3: the network has the classes 0 to 2"),
        ({"labels": train_labels * 1.0}, "train_labels are float64"),
    ]:
        arrays = (train_images, options.pop("labels", train_labels), *queries)
        with pytest.raises(ValueError, match=message):
            block_scores(model, options.pop("k", 1), arrays, **options)
    for part, arrays in (
        ("train", (train_images[:0], train_labels[:0], *queries)),
        ("query", (train_images, train_labels, queries[0][:0], queries[1][:0])),
    ):
        with pytest.raises(ValueError, match=rf"{part}_labels are int64 \(0,\): pass one integer for each"):
            block_scores(model, 1, arrays)


def test_too_few_iterations_are_told(model, images):
    with pytest.raises(RuntimeError, match="after 1 iterations of 1: raise damping or tolerance"):
        block_scores(model, 1, images, max_iterations=1)
