"""Names and shapes: which network they are, and where it hides in a checkpoint. No file is read here."""

import hashlib
import io
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from advtransfer.models import ARCHITECTURES, create_module
from advtransfer.torch_checkpoint import state_dict
from advtransfer.torch_checkpoint.layout import infer_architecture, layout
from advtransfer.torch_checkpoint.state_dict import check_copies, find_network
from advtransfer.torch_reader import CheckpointError, Contents, File, Stub, Tensor
from advtransfer.torch_reader.tensors import Storage, contiguous

# The start of the SHA-256 of the lines "name shape" of torchvision 0.28's state dicts, in order, without
# num_batches_tracked.
TORCHVISION = {
    **{"resnet18": "f70b90acc4b42e13", "resnet34": "1eddc54194ca6b04", "resnet50": "fa8a2ba5a01c9375"},
    **{"resnet101": "da89ea62078932e4", "resnet152": "beda52c1587effdf"},
    **{"wide_resnet50_2": "5a263835ef474440", "wide_resnet101_2": "539fc42500ca68f8"},
    "resnext50_32x4d": "7887bae2c8c6ae2d",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tensor(value, dtype="float32"):
    """A tensor that has its values; one of a shape only cannot be read."""
    if isinstance(value, tuple):
        return contiguous(Storage(None, "0", dtype, 4 * math.prod(value), False), value)
    array = np.asarray(value, dtype)
    file = File(Path("a"), io.BytesIO(array.tobytes()), array.nbytes)
    return contiguous(Storage(file, "0", dtype, array.nbytes, False, start=0), array.shape)


def network(architecture="resnet_tiny", num_classes=10):
    entries = layout(create_module(architecture, num_classes=num_classes))
    return {name: tensor(entry.shape) for name, entry in entries.items()}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def find(tree, weights=""):
    return find_network(Contents(tree, "PyTorch zip", (), {}), weights)


def refused(message, tree, weights=""):
    with pytest.raises(CheckpointError, match=message) as error:
        found = find(tree, weights)
        check_copies(found)
        infer_architecture(found.tensors)
    assert "\n" not in str(error.value)


# --- names and shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_shapes_and_order_are_torchvision_s(name):
    lines = [f"{key} {entry.shape}" for key, entry in layout(create_module(name)).items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == TORCHVISION[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_variable_has_a_name_and_every_architecture_is_inferred(name):
    module = create_module(name, num_classes=7)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    want = {tuple(entry.key for entry in path): leaf.shape for path, leaf in leaves}
    entries = layout(module).values()
    shapes = [
        np.transpose(np.empty(e.shape, "b"), {4: (2, 3, 1, 0)}.get(len(e.shape))).shape for e in entries
    ]
    assert dict(zip((entry.path for entry in entries), shapes, strict=True)) == want
    assert len(entries) == len(want)
    ordered = network(name)
    assert infer_architecture(ordered) == infer_architecture(dict(sorted(ordered.items()))) == name


OUTSIDE = {
    "layer1.0.conv1.weight": "no ResNet was found: the first names are layer1.0.conv1.weight$",
    "module.conv1.0.weight module.conv1.6.weight module.layer1.0.conv1.weight": "a ResNet with a deep stem",
    "conv1.weight layer1.0.conv1.weight layer2.0.downsample.2.weight": "a ResNet-D (avg_down",
    "conv1.weight layer1.0.conv1.weight layer1.0.se.fc1.weight": "an SE-ResNet",
    "conv1.weight layer1.0.conv1.weight layer1.0.se.conv.weight": "an ECA-ResNet",
    "conv1.weight layer1.0.conv2.paths.0.conv.weight": "an SK-ResNet",
    "conv1.weight layer1.0.conv1.weight layer2.0.downsample.0.filt": "an anti-aliased ResNet",
    "visual.conv1.weight visual.layer1.0.conv1.weight visual.attnpool.q_proj.weight": "CLIP's ResNet",
    "module.block1.layer.0.bn1.weight": "a WideResNet such as WRN-28-10",
    "stem.conv.weight stages.0.blocks.0.norm3.weight": "a pre-activation ResNetV2",
    "features.0.weight features.10.weight classifier.6.weight": "an AlexNet",
    "module.model.features.0.weight module.model.features.12.weight": "a VGG",
    "features.denseblock1.denselayer1.norm1.weight": "a DenseNet",
    "features.0.0.weight features.1.conv.0.0.weight": "a MobileNet",
    "conv1.0.weight stage2.0.branch1.0.weight": "a ShuffleNet",
    "model.cls_token model.patch_embed.proj.weight": "a vision transformer",
    "features.1.0.layer_scale": "a ConvNeXt",
    "weight bias": "no ResNet was found: the first names are weight, bias$",
}


@pytest.mark.parametrize("names", OUTSIDE)
def test_other_networks_are_refused_by_name(names):
    message = OUTSIDE[names].replace("(", r"\(")
    refused(message, {"state_dict": {name: tensor((4, 4, 3, 3)) for name in names.split()}})


def test_resnets_outside_the_family_are_described():
    resnet26 = {n: t for n, t in network("resnet50").items() if not re.search(r"\.[2-5]\.", n[6:9])}
    refused("bottleneck ResNet with stages 2-2-2-2, width 64, .*stem 7×7; supported: resnet18", resnet26)
    grouped = {"layer1.0.conv1.weight": (256, 64, 1, 1), "layer1.0.conv2.weight": (256, 8, 3, 3)}
    grouped = network("resnet101") | {name: tensor(shape) for name, shape in grouped.items()}
    refused("stages 3-4-23-3, width 64, 3×3 convolutions of 32 × 8 channels", grouped)
    refused("pre-activation ResNet", {n: t for n, t in network().items() if not n.startswith("bn1.")})
    refused("without BatchNorm", {n: t for n, t in network().items() if "running" not in n})


def test_what_is_no_state_dict():
    resnet = Stub("torchvision.models.resnet.ResNet")
    message = r"contains a pickled torchvision.models.resnet.ResNet object, not a state dict: .*torch.save\("
    refused(message, resnet)
    refused(message, {"model": resnet, "epoch": 3})
    refused("a list, not a state dict", [1, 2])
    refused("no state dict was found: the top-level keys are epoch, student", {"epoch": 3, "student": {}})
    refused("no state dict was found: the top-level keys are none", {})
    for count, rest in ((100, " and 92 more"), (9, " and 1 more"), (8, "")):
        refused(f"conv7.weight{rest}$", {f"conv{i}.weight": tensor((1,)) for i in range(count)})
    for name, shown in (("x" * 100, "x" * 100), ("x" * 101, f"'{'x' * 100}'..."), ("a\nb", r"'a\nb'")):
        refused(f"the first names are {re.escape(shown)}$", {name: tensor((1,))})
    refused("the first names are 'a b'$", {"a b": tensor((1,))})


def test_the_tensors_of_a_file_are_bounded(monkeypatch):
    named = []
    monkeypatch.setattr(state_dict, "name_other", lambda names, **kind: named.append(len(list(names))))
    state = {f"conv{i}.weight": tensor((1,)) for i in range(10_000)}
    refused("no ResNet was found", dict.fromkeys(("model", "ema"), state) | state)
    assert len(named) == 1  # its patterns take time
    for tree in (state | {"more": tensor((1,))}, {"model": state | {"more": tensor((1,))}}):
        refused("contains 10,001 tensors, more than the supported 10,000", tree)
    assert len(named) == 1
    find({"ema": network(), "model": {"a": tensor((1,))}})
    assert len(named) == 2
    passes = []  # over all names, to look for the children of a Sequential
    monkeypatch.setattr(state_dict, "_numbered_children", lambda _, prefix: passes.append(prefix))
    refused("no ResNet was found", {f"a{i}.4.0.conv1.weight": tensor((1,)) for i in range(100)})
    assert len(passes) == 17


# --- where the network is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.model.", "_orig_mod.", "1.", "encoder_q."])
@pytest.mark.parametrize("key", ["", "state_dict", "model", "ema"])
def test_the_network_is_found_in_its_wrappers(prefix, key):
    want = network()
    state = prefixed(prefix, want | {"bn1.num_batches_tracked": tensor((), "int64")})
    state["n_averaged"] = tensor((), "int64")
    found = find({key: state} if key else state)
    assert found.tensors == want
    assert found.wrapping == "/".join(filter(None, (key, prefix)))
    assert (found.strays, found.mean, found.std) == ({}, None, None)


def test_names_are_changed_where_they_should_be():
    """A prefix at the start only; those of MadryLab/robustness' CIFAR networks, unless both are there."""
    inner, both = "layer1.0.model.conv9.weight", "linear.weight"
    assert inner in find(prefixed("model.", network() | {inner: tensor((1,))})).tensors
    assert both in find(network() | {both: tensor((1,))}).tensors
    want = network("resnet18_cifar")
    assert "layer2.0.downsample.1.running_var" in want
    state = {n.replace("downsample", "shortcut").replace("fc.", "linear."): t for n, t in want.items()}
    assert find(prefixed("module.", state)).tensors == want


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("model", "ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_EMA"),
        ("state_dict", "ema_state_dict"),
        ("student/module.backbone.", "teacher/module.backbone."),
        ("model/net.", "model/ema_net."),
        ("net.", "swa_net."),
        ("", "ema.module."),
        ("online/encoder.", "average/encoder."),
    ],
)
def test_averaged_weights_come_before_plain_ones(plain, averaged):
    tensors = {plain: network(), averaged: network()}
    tree = {"epoch": 3}
    for wrapping in (plain, averaged):
        key, _, prefix = wrapping.rpartition("/") if "." in wrapping else (wrapping, "", "")
        state = tree.setdefault(key, {}) if key else tree
        state.update(prefixed(prefix, tensors[wrapping]))
    found = find(tree)
    assert found.tensors == tensors[averaged]
    assert (found.wrapping, found.others) == (averaged, (plain or ".",))
    for weights, want in ((plain or ".", plain), (averaged, averaged), (averaged.rstrip("."), averaged)):
        found = find(tree, weights)
        assert found.tensors == tensors[want] and found.wrapping == want
    for wrapping in (plain or ".", averaged):
        message = "no network under other: config.checkpoint.weights \\(weights=\\) can be .*"
        refused(message + re.escape(wrapping), tree, "other")


def test_what_is_no_average_does_not_come_first():
    """A teacher of another architecture, an average of the parameters alone, and names that look like it."""
    ours = network()
    found = find({"student": ours, "ema": {n: t for n, t in ours.items() if "run" not in n}})
    assert (found.tensors, found.others) == (ours, ("ema",))
    distilled = {"student": ours, "teacher": network("resnet18")}
    assert list(find(distilled).copies) == ["teacher"]
    message = (
        "contains two networks, .* select one with config.checkpoint.weights \\(weights=\\): student, teacher"
    )
    refused(message, distilled)
    assert find(distilled, "student").tensors == ours
    for name in ("cinema", "schemata", "teachers_pet"):
        assert list(find({"net": ours, name: network()}).copies) == [name]


def test_one_of_several_is_chosen_by_a_part_of_its_name():
    query, key = network(), network()
    query["fc.bias"], key["fc.bias"] = tensor([0.0] * 10), tensor([1.0] * 10)
    state = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", key)
    tree = {"state_dict": state | {"module.queue": tensor((128, 64))}}
    equal = {n: tensor(np.zeros(t.shape)) for n, t in query.items() if n != "fc.bias"}
    both = prefixed("module.encoder_q.", query | equal) | prefixed("module.encoder_k.", key | equal)
    choices = "state_dict/module.encoder_q., state_dict/module.encoder_k."
    refused(f"differ in fc.bias: select one with .*: {choices}$", {"state_dict": both})
    for weights in ("encoder_q", "module.encoder_q", "state_dict/module.encoder_q."):
        found = find(tree, weights)
        assert found.tensors == query and list(found.strays) == ["module.queue"]
        assert found.others == ("state_dict/module.encoder_k.",)
    assert list(find(tree, "state_dict").copies) == ["state_dict/module.encoder_k."]


@pytest.mark.parametrize("prefix", ["", "backbone.", "0."])
@pytest.mark.parametrize("first", [4, 3])  # the pooling counts, where there is one
def test_children_in_a_sequential(prefix, first):
    ours, names = network(), {"conv1": 0, "bn1": 1, "fc": 9} | {f"layer{i + 1}": first + i for i in range(4)}

    def number(name):
        child, _, rest = name.partition(".")
        return f"{names[child]}.{rest}"

    state = prefixed(prefix, {number(name): t for name, t in ours.items()})
    found = find(state)
    head = {"9.weight": ours["fc.weight"], "9.bias": ours["fc.bias"]}
    assert found.tensors == {n: t for n, t in ours.items() if not n.startswith("fc.")} | head
    assert infer_architecture(found.tensors) == "resnet_tiny" and found.wrapping == prefix
    for changed in (  # no stem, a stem of more, a stage left out
        {n: t for n, t in state.items() if not n.startswith(f"{prefix}0.")},
        state | {f"{prefix}2.weight": tensor((1,))},
        {n: t for n, t in state.items() if not n.startswith(f"{prefix}{first + 1}.")},
    ):
        refused("no ResNet was found", changed)


def test_the_longest_prefix_wins():
    ours, copy = network(), network()
    found = find(ours | prefixed("module.", copy))
    assert found.tensors == ours and found.copies == {"module.": copy} and found.strays == {}
    found = find(prefixed("a.", ours) | prefixed("a.b.", copy) | {"c.d": tensor((1,))})
    assert found.tensors == ours and found.copies == {"a.b.": copy} and list(found.strays) == ["c.d"]


def test_copies_must_be_equal():
    ours = network()
    copies = prefixed("module.model.", ours) | prefixed("module.attacker.model.", ours)
    check_copies(find({"model": copies}))  # the same memory: nothing is read
    name = "module.attacker.model.fc.bias"
    ours["fc.bias"] = tensor([0.0, 1.0])
    copies |= {"module.model.fc.bias": ours["fc.bias"], name: tensor([0.0, 1.0])}
    found = find(copies)
    check_copies(found)
    assert found.tensors == ours
    message = "under module.model. and module.attacker.model., that differ in fc.bias"
    for other in (tensor([0.0, 1.5]), tensor([0.0, 1.0], "float64"), tensor([[0.0, 1.0]])):
        refused(message, copies | {name: other})
    refused("differ in fc.bias", {n: t for n, t in copies.items() if n != name})
    many = {f"{i}.{name}": t for i in range(9) for name, t in ours.items()}
    refused("contains more than 8 networks", many)
    eight = find({name: t for name, t in many.items() if not name.startswith("8.")})
    assert list(eight.copies) == [f"{i}." for i in range(1, 8)]
    refused("differ in fc.more", copies | {"module.attacker.model.fc.more": tensor((1,))})


# --- wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize(
    "names",
    [
        ("module.normalizer.new_mean", "module.normalizer.new_std"),
        *((f"{prefix}mean", f"{prefix}std") for prefix in ("normalize.", "module.0.normalizer.")),
        ("mu", "sigma"),
    ],
)
def test_the_normaliser_s_buffers(names, shape):
    buffers = {n: tensor(np.reshape(x, shape)) for n, x in zip(names, (MEAN, STD), strict=True)}
    found = find(prefixed("module.model.", network()) | buffers)
    assert (found.mean, found.std, found.strays) == (MEAN, STD, {})


def test_normalisers_must_agree():
    def normaliser(prefix, std=STD):
        return {f"{prefix}.new_mean": tensor(list(MEAN)), f"{prefix}.new_std": tensor(list(std))}

    state = prefixed("model.", network()) | normaliser("normalizer")
    assert find(state | normaliser("attacker.normalize")).mean == MEAN
    beside = {"state_dict": state, "mean": list(MEAN), "std": STD}
    assert find(beside).mean == MEAN
    refused("two normalisations differ: mean, normalizer.new_mean", beside | {"std": [1.0, 1.0, 1.0]})
    other = normaliser("attacker.normalize", MEAN)
    refused("two normalisations differ: normalizer.new_mean, attacker.normalize.new_mean", state | other)


@pytest.mark.parametrize("names", [("mean", "std"), ("new_mean", "new_std"), ("mu", "sigma")])
def test_a_normalisation_beside_the_network(names):
    def found(*values):
        inside = find({"state_dict": network(), **dict(zip(names, values, strict=False))})
        return inside.mean, inside.std

    as_tensors = tensor(list(MEAN)), tensor(np.reshape(STD, (1, 3, 1, 1)))
    assert found(MEAN, STD) == found(list(MEAN), STD) == found(*as_tensors) == (MEAN, STD)
    others = ["abc", 0.5, (0.5, 0.5), [True] * 3, [None] * 3, tensor((3, 2)), {}, None]
    for mean in (*others, [2**53] * 3, [0.5, 0.5, -(2**53)], [10**400] * 3):
        assert found(mean, STD) == (None, None)
    assert found(MEAN) == (None, None)


@pytest.mark.parametrize("stray", ["normalizer.mean", "optimizer.weight", "layer1.0.conv1.weight"])
def test_what_belongs_to_nothing_is_a_stray(stray):
    found = find(prefixed("model.", network()) | {stray: tensor((3,))})
    assert list(found.strays) == [stray]


def test_claims_are_the_numbers_beside_the_network(monkeypatch):
    good = {"epoch": 90, "best_acc1": 0.25, "largest": 2**53 - 1, "smallest": 1 - 2**53}
    tensors = {"nat_prec1": tensor(57.9), "adv_prec1": tensor([35.5]), "one": tensor([[7.0]])}
    other = {"amp": None, "flag": True, "arch": "resnet50", "loss": math.nan, "optimizer": {"lr": 0.1}, 3: 4}
    other |= {"huge": 10**400, "small": -(10**400), "larger": 2**53, "smaller": -(2**53)}
    other |= {"empty": tensor(np.zeros((0, 1))), "broken": tensor((), "qint8"), "big": tensor((7, 7))}
    found = find({"model": network(), **good, **tensors, **other}).claims
    nat_prec1 = pytest.approx(57.9, rel=1e-7)
    assert found == good | {"nat_prec1": nat_prec1, "adv_prec1": 35.5, "one": 7.0}
    assert all(type(value) in (int, float) for value in found.values())
    # However many there are, 64 are looked at, those that cannot be read among them.
    scalars = {f"k{i}": tensor(float(i)) for i in range(100)}
    assert find({"model": network()} | scalars).claims == {f"k{i}": i for i in range(64)}
    reads, read = [], Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda one: reads.append(0) or read(one))
    broken = {f"k{i}": tensor((), "qint8") for i in range(1_000)}
    assert find({"model": network(), **broken, "epoch": 3}).claims == {}
    assert len(reads) == 64
    assert find({"model": network(), "x" * 1_000: 1}).claims == {"x" * 100: 1}
