"""The table of known models."""

import re

import pytest

from advtransfer.models import ARCHITECTURES
from advtransfer.torch_checkpoint.catalogue import KNOWN_MODELS, find_known, known_models_table


def test_known_models_are_well_formed():
    assert len({(known.repo, known.file) for known in KNOWN_MODELS}) == len(KNOWN_MODELS) == 98
    hashes = [known.sha256 for known in KNOWN_MODELS if known.sha256]
    assert len(set(hashes)) == len(hashes) and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    for known in KNOWN_MODELS:
        assert known.architecture in ARCHITECTURES and 0.4 < known.accuracy < 1
        assert (known.norm, known.eps > 0) in {("none", False), ("l2", True), ("linf", True)}
        assert known.eps < (8.1 / 255 if known.norm == "linf" else 5.1)
        assert (known.mean is None) == (known.std is None)
        cifar = known.dataset == "CIFAR-10"
        assert known.architecture.endswith("_cifar") == cifar
        assert known.image_size == {"Wong2020Fast.pt": 288}.get(known.file, 32 if cifar else 224)
        if known.source.endswith("RobustBench/robustbench"):
            assert known.norm == "linf" and known.eps == pytest.approx(4 / 255, rel=1e-12)


def test_the_names_of_robust_models_say_what_the_table_says():
    families = {}
    for known in KNOWN_MODELS:
        if match := re.fullmatch(r"(.+)_(l2|linf)_eps([\d.]+)\.ckpt", known.file):
            architecture, norm, eps = match[1], match[2], float(match[3])
            radius = eps / 255 if norm == "linf" else eps
            assert (known.architecture, known.norm) == (architecture, norm if eps else "none")
            assert known.eps == pytest.approx(radius, rel=1e-12)
            families.setdefault((architecture, norm), []).append((radius, known.accuracy))
    assert {family: len(points) for family, points in families.items()} == {
        **{(name, "l2"): 10 for name in ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet50_4")},
        **{(name, "linf"): 5 for name in ("resnet18", "resnet50", "wide_resnet50_2")},
        ("resnext50_32x4d", "l2"): 2,
    }
    for (_, norm), points in families.items():  # past the smallest radii, robustness costs accuracy
        falling = [accuracy for radius, accuracy in sorted(points) if norm == "linf" or radius >= 0.05]
        assert falling == sorted(falling, reverse=True)


def test_the_names_of_the_models_of_robustness_say_what_the_table_says():
    found = []
    for known in KNOWN_MODELS:
        if match := re.fullmatch(r"(cifar|imagenet)_(l2|linf|nat)_?([\d_]*)\.pt", known.file):
            radius = float(match[3].replace("_", ".") or 0) / (255 if match[2] == "linf" else 1)
            assert known.eps == pytest.approx(radius, rel=1e-12)
            assert known.norm == (match[2] if radius else "none")
            found.append(match[1])
    assert sorted(found) == ["cifar"] * 5 + ["imagenet"] * 3


@pytest.mark.parametrize(
    ("file", "architecture", "norm", "eps", "percent"),
    [
        ("resnet50_l2_eps3.ckpt", "resnet50", "l2", 3, 62.83),
        ("resnet18_linf_eps0.5.ckpt", "resnet18", "linf", 0.5 / 255, 66.13),
        ("wide_resnet50_4_l2_eps0.ckpt", "wide_resnet50_4", "none", 0, 77.91),
        ("imagenet_linf_4.pt", "resnet50", "linf", 4 / 255, 62.42),
        ("cifar_l2_0_5.pt", "resnet50_cifar", "l2", 0.5, 90.83),
        ("Salman2020Do_R18.pt", "resnet18", "linf", 4 / 255, 52.92),
        ("resnet50-0676ba61.pth", "resnet50", "none", 0, 76.13),
    ],
)
def test_models_are_found_by_name(file, architecture, norm, eps, percent):
    known = find_known(file)
    assert (known.file, known.architecture, known.norm) == (file, architecture, norm)
    assert (known.eps, known.accuracy) == pytest.approx((eps, percent / 100))


def test_a_hash_goes_before_a_name_and_a_common_name_needs_its_repository():
    sha256 = "9e62216975c111b8081481533b6142dec34be69abe5d90b54d7f860015c263db"
    for name in ("resnet50_linf_eps4.0.ckpt", "renamed.ckpt", "resnet50_l2_eps3.ckpt", "model.safetensors"):
        assert find_known(name, sha256.upper()).file == "resnet50_linf_eps4.0.ckpt"
    assert find_known("resnet50_linf_eps4.0.ckpt").sha256 == sha256
    assert find_known("resnet50_l2_eps3.ckpt", "0" * 64).file == "resnet50_l2_eps3.ckpt"
    timm = find_known("model.safetensors", repo="timm/resnet34.tv_in1k")
    assert (timm.architecture, timm.accuracy) == ("resnet34", pytest.approx(0.73314))
    for unknown in ({}, {"repo": "someone/else"}, {"sha256": "0" * 64}):
        assert find_known("model.safetensors", **unknown) is None
    assert find_known("unheard-of.pt") is None and find_known("", "") is None


def test_the_table_has_a_row_for_every_model():
    lines = known_models_table().splitlines()
    assert max(map(len, lines)) <= 110 and all(line == line.rstrip() for line in lines)
    rows = [line.split() for line in lines]
    salman = "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt resnet50 l2 3 62.83 *"
    assert salman.split() in rows
    assert ["cifar_linf_8.pt", "resnet50_cifar", "linf", "8/255", "87.03"] in rows
    firsts = [row[0] for row in rows if row]
    for known in KNOWN_MODELS:
        assert firsts.count(f"hf:{known.repo}/{known.file}" if known.repo else known.file) == 1
        assert any(known.source in line and f"({known.licence})" in line for line in lines)
