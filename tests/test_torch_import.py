"""Checkpoints of every make, written by real PyTorch, against PyTorch's logits; and the way back."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from advtransfer.hub import Fetched
from advtransfer.models import ARCHITECTURES, create_module, load_model, logits_fn, save_model
from advtransfer.torch_checkpoint import convert, export_torch_state_dict, import_torch_checkpoint
from advtransfer.torch_checkpoint.catalogue import KnownModel, find_known
from advtransfer.torch_reader import CheckpointError, File, open_checkpoint

NETWORKS = Path(__file__).parent / "fixtures" / "networks"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.201)}
CLAIMS = {"epoch": 90, "nat_prec1": pytest.approx(57.9, rel=1e-7), "adv_prec1": 35.25}


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch):
    """Those of fixtures/make_networks.py."""
    basic = {"stage_sizes": (1, 1), "bottleneck": False, "width": 4, "cifar_stem": True}
    bottleneck = {"stage_sizes": (2, 1), "bottleneck": True, "width": 4, "groups": 2, "base_width": 32}
    monkeypatch.setitem(ARCHITECTURES, "small_basic", basic)
    monkeypatch.setitem(ARCHITECTURES, "small_bottleneck", bottleneck)


@pytest.fixture
def model():
    return import_torch_checkpoint(NETWORKS / "hub.ckpt", norm="l2", eps=3.0)


def images(size):
    return np.random.default_rng(size).random((2, size, size, 3), np.float32)


run = jax.jit(lambda network, images: network(images))


def refused(message, *args, error=CheckpointError, **options):
    with pytest.raises(error, match=message) as caught:
        import_torch_checkpoint(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# File -> network, format, wrapping, what says how images are normalised.
FILES = {
    "robustness.pt": ("small_bottleneck", "PyTorch legacy", "model/module.model.", "file"),
    "hub.ckpt": ("small_bottleneck", "PyTorch zip", "model/module.model.", "file"),
    "custom_forward.ckpt": ("small_basic", "PyTorch zip", "state_dict/module.model.model.", "file"),
    "robustness_cifar.pt": ("small_basic", "PyTorch legacy", "model/module.model.", "file"),
    "robustbench.pt": ("small_basic", "PyTorch zip", "module.model.", "file"),
    "torchvision.pth": ("small_bottleneck", "PyTorch zip", "", "ImageNet"),
    "timm.safetensors": ("small_bottleneck", "safetensors", "", "ImageNet"),
    "data_parallel.pth": ("small_basic", "PyTorch zip", "module.", "argument"),
    "half.pth": ("small_basic", "PyTorch zip", "state_dict", "argument"),
    "bfloat16.pth": ("small_basic", "PyTorch zip", "state_dict", "argument"),
}


@pytest.mark.parametrize("file", FILES)
def test_logits_are_pytorch_s(file):
    architecture, kind, wrapping, normalisation = FILES[file]
    given = CIFAR if normalisation == "argument" else {}
    model = import_torch_checkpoint(NETWORKS / file, **given)
    spec = model.spec
    assert (spec.architecture, spec.num_classes) == (architecture, 5)
    assert {"mean": spec.mean, "std": spec.std} == (CIFAR if architecture == "small_basic" else IMAGENET)
    assert spec.image_size == (32 if architecture == "small_basic" else 224)
    assert spec.provenance["format"] == kind
    assert spec.provenance["wrapping"] == wrapping
    assert spec.provenance["normalisation"] == normalisation
    chex.assert_type(jax.tree.leaves(model.variables), jnp.float32)
    word = Path(file).stem if file in ("half.pth", "bfloat16.pth") else architecture
    for size in (32, 224) if word == architecture else (32,):
        want = np.load(NETWORKS / f"{word}_{size}.npy")
        model = import_torch_checkpoint(NETWORKS / file, **given, image_size=size)
        got = run(logits_fn(model), images(size))
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_provenance(tmp_path):
    path = NETWORKS / "robustness.pt"
    model = import_torch_checkpoint(path, norm="linf", eps=4 / 255)
    stubs = model.spec.provenance["stubs"]
    assert "dill._dill._create_function" in stubs  # the schedule's lambda
    assert model.spec.provenance == {
        "file": "robustness.pt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "format": "PyTorch legacy",
        "stubs": stubs,
        "wrapping": "model/module.model.",
        "weights": "file",
        "head": "file",
        "left_out": [],
        "claims": CLAIMS,
        "normalisation": "file",
        "forward_pass": "assumed",
        "threat_model": "argument",
    }
    assert (model.spec.norm, model.spec.eps) == ("linf", 4 / 255)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert {**vars(loaded.spec), "versions": {}} == vars(model.spec)
    assert loaded.module == model.module
    chex.assert_trees_all_equal(loaded.variables, model.variables)


HALF = (0.5,) * 3
RGB = r"; expected three numbers in \[0, 1\]", r"; expected three numbers in \(0, 1\]"
BAD_MEANS = (HALF[:2], (*HALF, 0.5), (123.7, 116.3, 103.5), (0, -1e-9, 1), (0, 1 + 1e-9, 1), (0, np.nan, 0))
BAD_STDS = (HALF[:2], (58.4, 57.1, 57.4), (0.5, 0, 0.5), (0.5, 0.5, 1.1), (0.5, np.inf, 0.5))
BAD_RADII = (None, 0.0, -1, np.inf, np.nan)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("pass both mean= and std=", {"mean": (0.5,) * 3}),
        *((f"mean is .*{RGB[0]}", {"mean": mean, "std": HALF}) for mean in BAD_MEANS),
        *((f"std is .*{RGB[1]}", {"mean": HALF, "std": std}) for std in BAD_STDS),
        ("eps=3 needs norm=", {"eps": 3.0}),
        ("did you mean 4/255, 0.0157", {"norm": "linf", "eps": 4.0}),
        ("eps=0 needs norm=", {"eps": 0.0}),
        *(("eps is .*; expected positive, as norm is l2", {"norm": "l2", "eps": eps}) for eps in BAD_RADII),
        *(("eps is .*; expected 0, as norm is none", {"norm": "none", "eps": eps}) for eps in (3.0, 1e-9)),
        ("norm is l1; expected one of none, l2, linf", {"norm": "l1", "eps": 3.0}),
        ("image_size is 0; expected a whole number of pixels", {"image_size": 0}),
        ("must be 8 to 64 hexadecimal digits", {"sha256": "wrong"}),
        ("unknown architecture 'resnet5'", {"architecture": "resnet5"}),
    ],
)
def test_arguments_that_make_no_sense(message, options):
    """They are refused before the file is opened, but for a name of no architecture."""
    path = NETWORKS / "hub.ckpt" if "architecture" in options else "no-such-file.pt"
    refused(message, path, error=ValueError, **options)


@pytest.mark.parametrize(
    ("mean", "std", "norm", "eps"),
    [
        ((0, 0.5, 1), (1e-9, 1, 1), "linf", 1e-9),
        (np.float32(HALF), list(HALF), "none", None),
        (HALF, HALF, None, None),
    ],
)
def test_what_the_caller_says_goes_first(mean, std, norm, eps):
    given = {"mean": mean, "std": std, "norm": norm, "eps": eps, "image_size": 64, "dtype": jnp.bfloat16}
    model = import_torch_checkpoint(NETWORKS / "robustness_cifar.pt", "small_basic", 5, **given)
    spec, module = model.spec, model.module
    assert (spec.mean, spec.std, spec.image_size) == (tuple(mean), tuple(std), 64)
    assert (module.mean, module.std, module.dtype) == (spec.mean, spec.std, jnp.bfloat16)
    assert (spec.norm, spec.eps) == (norm or "none", eps or 0)
    assert spec.provenance["normalisation"] == "argument"
    assert spec.provenance["threat_model"] == ("argument" if norm else "unknown")


def test_files_that_are_no_network(tmp_path):
    refused("there is no such file", tmp_path / "none.pt")
    refused("contains a pickled .*TorchResNet object, not a state dict", NETWORKS / "whole_module.pth")
    message = "module.model.model. and state_dict/module.attacker.model.model., that differ in layer2.0.conv1"
    refused(message, NETWORKS / "attacker_differs.ckpt")
    message = "the normalisation of the images is unknown: import it with mean and std"
    assert refused(message, NETWORKS / "data_parallel.pth").count(str(NETWORKS)) == 1


def test_a_mismatch_lists_both_sides():
    message = refused("do not fit resnet18 with 5 classes: ", NETWORKS / "torchvision.pth", "resnet18")
    assert "missing layer1.1.bn1.bias" not in message  # the file has it
    assert "missing layer2.1.conv1.weight, layer2.1.bn1.weight, " in message
    assert "unexpected layer1.0.conv3.weight, " in message and " and 12 more" in message
    assert "conv1.weight has shape (4, 3, 7, 7), not (64, 3, 7, 7)" in message
    assert message.endswith("they match small_bottleneck")
    refused(
        r"fit small_bottleneck with 10 classes: fc.weight has shape \(5, 32\), not \(10, 32\), fc.bias has",
        NETWORKS / "torchvision.pth",
        num_classes=10,
    )


@pytest.fixture
def saved(model, tmp_path):
    """Writes the model's tensors with some changed, or (None) left out."""

    def save(metadata=None, **changes):
        tensors = export_torch_state_dict(model) | {k.replace("__", "."): v for k, v in changes.items()}
        path = tmp_path / "changed.safetensors"
        safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)
        return path

    return save


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floats_become_float32(model, saved, dtype):
    bias = np.array([1 / 3, -2.5, 1e-3, 7, 0], dtype)
    changed = import_torch_checkpoint(saved(fc__bias=bias))
    np.testing.assert_array_equal(changed.variables["params"]["fc"]["bias"], bias.astype(np.float32))


def test_weights_that_are_no_weights(saved):
    bias, variance = np.zeros(5, np.float32), np.float32([1, 1, 0, 1])  # 0: a channel that never varied
    assert import_torch_checkpoint(saved(bn1__running_var=variance)).spec.num_classes == 5
    std = r"std is \(0.2, 0.0, 0.2\); expected three numbers in \(0, 1\]"
    for message, changed in (
        ("fc.bias has type int8, not float", {"fc__bias": bias.astype(np.int8)}),
        ("fc.bias contains NaN", {"fc__bias": bias * np.nan}),
        ("fc.bias contains infinity", {"fc__bias": bias + np.inf}),
        ("fc.bias contains infinity", {"fc__bias": bias.astype(np.float64) + 1e300}),
        ("bn1.running_var contains a negative variance", {"bn1__running_var": variance - np.float32(1e-9)}),
        (
            "the mean or std of the images has type int64, not float",
            {"mean": np.zeros(3, np.int64), "std": np.ones(3, np.int64)},
        ),
        ("fit small_bottleneck with 5 classes: missing layer2.0.bn1.bias$", {"layer2__0__bn1__bias": None}),
        ("unexpected layer1.0.more.bias$", {"layer1__0__more__bias": bias}),
        ("unexpected stem.conv.weight$", {"stem__conv__weight": np.zeros((4, 2, 1, 1), np.float32)}),
        (f"{std}: import it with mean and std", {"mean": bias[:3], "std": np.float32([0.2, 0, 0.2])}),
    ):
        refused(message, saved(**changed))


HEADS = {  # what replaces fc.weight and fc.bias, and what is said of it
    "none": ({}, []),
    "without a bias": ({"fc.weight": (5, 32)}, ["fc (1 tensor)"]),
    "of other features": ({"fc.weight": (5, 33), "fc.bias": (5,)}, ["fc (2 tensors)"]),
    "a convolution": ({"fc.weight": (5, 32, 1, 1), "fc.bias": (5,)}, ["fc (2 tensors)"]),
    "with a wrong bias": ({"fc.weight": (5, 32), "fc.bias": (1, 5)}, ["fc (2 tensors)"]),
    "Sequential(Dropout, Linear)": ({"fc.1.weight": (5, 32), "fc.1.bias": (5,)}, ["fc (2 tensors)"]),
    "a projection": ({f"fc.{i}.weight": (32, 32) for i in (0, 2)}, ["fc (2 tensors)"]),
    "of another name": ({"a.b.weight": (5, 32), "top.p": (1,)}, ["a (1 tensor)", "top (1 tensor)"]),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_network_without_its_head(model, tmp_path, kind, wrapped, caplog):
    shapes, left_out = HEADS[kind]
    path, prefix = tmp_path / "a.safetensors", "module." if wrapped else ""
    body = {n: x for n, x in export_torch_state_dict(model).items() if not n.startswith("fc.")}
    beside = {"criterion.weight": np.ones(5, np.float32)} if wrapped else {}
    head = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file({prefix + n: x for n, x in (body | head).items()} | beside, path)
    found = import_torch_checkpoint(path)
    params, want = found.variables["params"], model.variables["params"]
    chex.assert_trees_all_equal(params | {"fc": want["fc"]}, want)
    chex.assert_trees_all_equal(found.variables["batch_stats"], model.variables["batch_stats"])
    assert found.spec.num_classes == 1 and not found.spec.has_head and not params["fc"]["kernel"].any()
    left_out = [prefix + name for name in left_out] + ["criterion (1 tensor)"] * wrapped
    assert found.spec.provenance["left_out"] == left_out and found.spec.provenance["head"] == "new"
    assert "with its new head the model can be fine-tuned, not evaluated" in caplog.text
    assert all(name in caplog.text for name in left_out)
    save_model(found, tmp_path / "model")
    assert not load_model(tmp_path / "model").spec.has_head
    exported = export_torch_state_dict(found, tmp_path / "again.safetensors")
    assert set(exported) == set(body)
    again = import_torch_checkpoint(tmp_path / "again.safetensors")
    chex.assert_trees_all_equal(again.variables, found.variables)
    assert not again.spec.has_head
    refused(
        "with 7 classes: .*fc.weight.*; it can be imported without a head by leaving out num_classes",
        path,
        None,
        7,
    )


def test_weights_beside_a_network_are_left_out(model, saved, tmp_path, caplog):
    """Its head is its own then: those of a criterion, a memory, and a projection behind it."""
    extra = {"criterion__weight": np.ones(5), "queue": np.ones((128, 64)), "queue_ptr": np.ones(1, np.int64)}
    extra |= {"projector__0__weight": np.ones((4, 32)), "projector__1__running_mean": np.ones(4)}
    found = import_torch_checkpoint(saved(**extra))
    chex.assert_trees_all_equal(found.variables, model.variables)
    names = ("criterion (1 tensor)", "queue (1 tensor)", "queue_ptr (1 tensor)", "projector (2 tensors)")
    assert sorted(found.spec.provenance["left_out"]) == sorted(names) and found.spec.has_head
    assert all(name in caplog.text for name in names)
    many = {f"task{i}__weight": np.ones(1) for i in range(30)}
    left_out = import_torch_checkpoint(saved(**many)).spec.provenance["left_out"]
    assert len(left_out) == 21 and left_out[-1] == "10 more"


def test_what_may_normalise_in_an_unknown_way_is_not_left_out(saved):
    path = saved(preprocess__m=np.ones((1, 3, 1, 1), np.float32))
    message = "preprocess.m has one value per channel and may normalise the images: import it with mean"
    refused(message, path)
    assert import_torch_checkpoint(path, **CIFAR).spec.provenance["left_out"] == ["preprocess (1 tensor)"]


def test_an_average_is_taken_and_the_other_can_be(model, tmp_path):
    """The choice of a part of a file; that of another part gives other weights."""
    plain = export_torch_state_dict(model)
    averaged = plain | {"fc.bias": plain["fc.bias"] + 1}
    path = tmp_path / "a.safetensors"
    wrapped = {f"model.{n}": x for n, x in plain.items()} | {f"ema.{n}": x for n, x in averaged.items()}
    safetensors.numpy.save_file(wrapped, path)
    for weights, bias in ((None, averaged), ("model", plain), ("ema", averaged)):
        other = "model." if bias is averaged else "ema."
        found = import_torch_checkpoint(path, weights=weights)
        np.testing.assert_array_equal(found.variables["params"]["fc"]["bias"], bias["fc.bias"])
        assert found.spec.provenance["left_out"] == [f"the network under {other} (selected by weights=)"]
    refused("contains no network under student: .* can be ema., model.", path, weights="student")


@pytest.mark.parametrize("file", ["torchvision.pth", "timm.safetensors"])
def test_from_pytorch_and_back_is_exact(file):
    exported = export_torch_state_dict(import_torch_checkpoint(NETWORKS / file))
    with open_checkpoint(NETWORKS / file) as contents:
        want = {name: tensor.read() for name, tensor in contents.tree.items()}
    if file.endswith(".pth"):
        assert list(exported) == list(want)  # in torchvision's order
    assert set(exported) == set(want)
    for name, array in want.items():
        if name.endswith("num_batches_tracked"):
            assert exported[name] == 0 and exported[name].shape == ()
            assert exported[name].dtype == np.int64
        else:
            assert exported[name].dtype == np.float32 and exported[name].flags.c_contiguous
            np.testing.assert_array_equal(exported[name].view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize("architecture", ["small_basic", "small_bottleneck"])
def test_to_pytorch_and_back_is_exact(architecture, model, tmp_path):
    if architecture == "small_basic":
        model = import_torch_checkpoint(NETWORKS / "half.pth", **CIFAR)
    spec = {**vars(model.spec), "class_names": tuple("abcdé"), "image_size": 48}
    model = model._replace(spec=type(model.spec)(**spec))
    path = tmp_path / "new" / "model.safetensors"
    written = export_torch_state_dict(model, path)
    again = import_torch_checkpoint(path)
    chex.assert_trees_all_equal(again.variables, model.variables)
    assert again.module == model.module
    assert {**vars(again.spec), "provenance": {}} == {**vars(model.spec), "provenance": {}}
    assert again.spec.provenance["normalisation"] == again.spec.provenance["threat_model"] == "metadata"
    assert os.listdir(path.parent) == ["model.safetensors"]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(written)


def test_a_file_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("years of work")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_torch_state_dict(model, path)
    assert path.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    for name in (".", "model.pth"):
        with pytest.raises(ValueError, match="must end in .safetensors"):
            export_torch_state_dict(model, tmp_path / name)


def metadata(**fields):
    good = {**IMAGENET, "norm": "l2", "eps": 1, "image_size": 8192, "class_names": []}
    return json.dumps(good | fields)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", "[" * 100_000, '{"mean": [NaN, 0, 0]}'),
        *(metadata(image_size=size) for size in (0, 8193, 224.0, 1e400)),
        *(metadata(eps=eps) for eps in (0, "l2", 10**400)),
        *(metadata(class_names=names) for names in (["a"], list("abcda"), [1, 2, 3, 4, 5])),
        *(metadata(**field) for field in ({"norm": "none"}, {"norm": []}, {"mean": [10**400] * 3})),
    ],
)
def test_damaged_metadata(saved, text):
    assert import_torch_checkpoint(saved({"advtransfer": metadata()})).spec.image_size == 8192
    refused("its metadata is damaged", saved({"advtransfer": text}))


# --- which file it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["hub.ckpt", "timm.safetensors"])
@pytest.mark.parametrize(
    "when", [(File, "sha256"), (convert, "find_known"), (convert, "find_network")], ids=lambda when: when[1]
)
def test_the_file_that_is_hashed_is_the_file_that_is_read(tmp_path, monkeypatch, file, when):
    """Whether another takes its name before it is hashed, after that, or after it was parsed."""
    path, other = shutil.copy(NETWORKS / file, tmp_path), tmp_path / "other"
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    want = import_torch_checkpoint(path)
    swapped = export_torch_state_dict(want)
    swapped["fc.bias"] += 1
    safetensors.numpy.save_file(swapped, other)
    original, done = getattr(*when), []

    def swap(*args, **options):
        if not done:
            done.append(os.replace(other, path))
        return original(*args, **options)

    monkeypatch.setattr(*when, swap)
    model = import_torch_checkpoint(path, sha256=sha256)
    assert done and model.spec.provenance["sha256"] == sha256
    bias = np.asarray(model.variables["params"]["fc"]["bias"])
    np.testing.assert_array_equal(bias, want.variables["params"]["fc"]["bias"])
    refused("its SHA-256 is", path, sha256=sha256)  # now it is the other one


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50", "resnetaa101d"])
def test_networks_that_blur_are_refused_by_name(tmp_path, monkeypatch, name):
    """They have the names and the shapes of a ResNet-50."""
    path = shutil.copy(NETWORKS / "hub.ckpt", tmp_path / f"{name}_a1h-0123abcd.pth")
    refused(name.rstrip("d"), path)
    plain = shutil.copy(NETWORKS / "hub.ckpt", tmp_path / "model.safetensors")
    fetched = Fetched(Path(plain), f"timm/{name}.sw_in12k", "model.safetensors", "abc")
    monkeypatch.setattr(convert, "fetch", lambda _: fetched)
    refused(name.rstrip("d"), "hf:timm/any/model.safetensors")
    assert import_torch_checkpoint(plain).spec.architecture == "small_bottleneck"


def known(**fields):
    values = ("hub.ckpt", "", "small_bottleneck", "l2", 3.0, "ImageNet", 0.5, "", "MIT", "X")
    return KnownModel(*values, image_size=99)._replace(**fields)


def test_a_known_model_says_what_it_is(monkeypatch):
    """A namesake of another architecture is not trusted."""
    fetched = Fetched(NETWORKS / "hub.ckpt", "some/repo", "folder/hub.ckpt", "abc")
    monkeypatch.setattr(convert, "fetch", lambda name: {"hf:some/repo/folder/hub.ckpt": fetched}[name])
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known())
    spec = import_torch_checkpoint("hf:some/repo/folder/hub.ckpt").spec
    assert (spec.norm, spec.eps, spec.image_size) == ("l2", 3.0, 99)
    published = {"dataset": "ImageNet", "accuracy": 0.5, "licence": "MIT", "source": "X"}
    hub = {"repo": "some/repo", "file": "folder/hub.ckpt", "revision": "abc"}
    want = {"file": "hub.ckpt", "threat_model": "table", "forward_pass": "table", "hub": hub}
    assert want | {"published": published} == {key: spec.provenance[key] for key in (*want, "published")}
    spec = import_torch_checkpoint(NETWORKS / "hub.ckpt", norm="none").spec
    assert (spec.norm, spec.eps, spec.provenance["threat_model"]) == ("none", 0.0, "argument")
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known(architecture="resnet50"))
    spec = import_torch_checkpoint(NETWORKS / "hub.ckpt").spec
    assert (spec.norm, spec.provenance["threat_model"]) == ("none", "unknown")
    assert not {"published", "hub"} & set(spec.provenance)


def test_hashes_that_are_pinned(monkeypatch, tmp_path):
    path = NETWORKS / "hub.ckpt"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert import_torch_checkpoint(path, sha256=sha256.upper()).spec.provenance["sha256"] == sha256
    with monkeypatch.context() as patch:
        patch.setattr(convert, "read_contents", lambda file: pytest.fail("read before it was compared"))
        for wrong in ("0" * 64, sha256[:8] + "0" * 56, sha256[:56] + "0" * 8):
            refused(f"its SHA-256 is {sha256}, not {wrong}", path, sha256=wrong)
        patch.setattr(convert, "find_known", lambda *args, **repo: known(sha256="1" * 64, source="the hub"))
        refused("not 11111111: download it again from the hub", path)
        patch.setattr(convert, "find_known", find_known)
        refused("not f37072fd", shutil.copy(path, tmp_path / "resnet18-f37072fd.pth"))
    for name in ("resnet18-20240315.pth", f"resnet50-{sha256[:8]}.pth"):  # of nobody: a date, any digits
        assert import_torch_checkpoint(shutil.copy(path, tmp_path / name)).spec.num_classes == 5
    assert import_torch_checkpoint(path, sha256=sha256[:8]).spec.num_classes == 5
    monkeypatch.setattr(convert, "find_known", lambda *args, **repo: known(sha256="1" * 64))
    spec = import_torch_checkpoint(path, sha256=sha256).spec  # asked for, but not the one of the table
    assert spec.provenance["threat_model"] == "unknown"


# All of them at 32 × 32, and at 224 × 224 one of each kind.
LIVE = [(name, 32) for name in ARCHITECTURES]
LIVE += [(name, 224) for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")]
FEW = [("resnet18", 32), ("resnext50_32x4d", 32), ("resnet_tiny", 32)]


@pytest.mark.parametrize(
    ("architecture", "size"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.sweep) for case in LIVE if case not in FEW)],
)
def test_live_against_pytorch(architecture, size, tmp_path):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet

    reference = TorchResNet(create_module(architecture, num_classes=11, **CIFAR)).eval()
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        want = reference(torch.tensor(images(size)).permute(0, 3, 1, 2)).numpy()
    torch.save({"state_dict": torch.nn.DataParallel(reference).state_dict()}, tmp_path / "reference.pth")
    model = import_torch_checkpoint(tmp_path / "reference.pth", num_classes=11, image_size=size)
    assert model.spec.architecture == architecture
    assert model.module.mean == CIFAR["mean"]
    got = np.asarray(run(logits_fn(model), images(size)))
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    exported = export_torch_state_dict(model)
    for name, tensor in reference.state_dict().items():
        if name not in ("mean", "std"):
            np.testing.assert_array_equal(exported[name], tensor.numpy())
