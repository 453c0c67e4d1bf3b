"""The known robust ResNets, and the natural ones to compare them with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from advtransfer.models import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, create_module, init_variables


class KnownModel(NamedTuple):
    """A published checkpoint."""

    file: str
    repo: str  # on the Hugging Face hub; "": not there
    architecture: str
    norm: str  # threat model of its training: none | l2 | linf
    eps: float  # its radius, pixel units
    dataset: str
    accuracy: float | None  # published, of the clean validation or test images; a fraction
    sha256: str  # of the file; "": not known
    licence: str
    source: str  # who published it, where
    mean: tuple[float, ...] | None = None  # where the file does not hold its normalisation
    std: tuple[float, ...] | None = None
    image_size: int = 224  # pixels; what the accuracy is of


_NUM_CLASSES = {"ImageNet": 1000, "CIFAR-10": 10}

# Percent, from the model card of madrylab/robust-imagenet-models.
_SALMAN_L2_EPS = (0, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 3, 5)
_SALMAN_L2 = {
    "resnet18": (69.79, 69.90, 69.24, 69.15, 68.77, 67.43, 65.49, 62.32, 53.12, 45.59),
    "resnet50": (75.80, 75.68, 75.76, 75.59, 74.78, 74.14, 73.16, 70.43, 62.83, 56.13),
    "wide_resnet50_2": (76.97, 77.25, 77.26, 77.17, 76.74, 76.21, 75.11, 73.41, 66.90, 60.94),
    "wide_resnet50_4": (77.91, 78.02, 77.87, 77.77, 77.64, 77.10, 76.52, 75.51, 69.67, 65.20),
}
_SALMAN_LINF_EPS = (0.5, 1.0, 2.0, 4.0, 8.0)  # / 255
_SALMAN_LINF = {
    "resnet18": (66.13, 63.46, 59.63, 52.49, 42.11),
    "resnet50": (73.73, 72.05, 69.10, 63.86, 54.53),
    "wide_resnet50_2": (75.82, 74.65, 72.35, 68.41, 60.82),
}
_SALMAN_OTHER = {"resnext50_32x4d": (77.38, 66.25)}  # l2 0 and 3

# From the README of MadryLab/robustness; all are ResNet-50.
_ROBUSTNESS = {
    "imagenet_l2_3_0.pt": ("l2", 3, 57.90),
    "imagenet_linf_4.pt": ("linf", 4, 62.42),
    "imagenet_linf_8.pt": ("linf", 8, 47.91),
    "cifar_nat.pt": ("none", 0, 95.25),
    "cifar_l2_0_25.pt": ("l2", 0.25, 92.77),
    "cifar_l2_0_5.pt": ("l2", 0.5, 90.83),
    "cifar_l2_1_0.pt": ("l2", 1, 81.62),
    "cifar_linf_8.pt": ("linf", 8, 87.03),
}

# From RobustBench's model_info/imagenet/Linf: accuracy on 5,000 of the images; all are linf 4/255.
_ROBUSTBENCH = {
    "Salman2020Do_R18.pt": ("resnet18", 52.92, 224),
    "Salman2020Do_R50.pt": ("resnet50", 64.02, 224),
    "Salman2020Do_50_2.pt": ("wide_resnet50_2", 68.46, 224),
    "Engstrom2019Robustness.pt": ("resnet50", 62.56, 224),
    "Wong2020Fast.pt": ("resnet50", 55.62, 288),
}

# From torchvision's models/resnet.py: (first digits of the SHA-256, accuracy) of versions 1 and 2.
_TORCHVISION = {
    "resnet18": (("f37072fd", 69.758),),
    "resnet34": (("b627a593", 73.314),),
    "resnet50": (("0676ba61", 76.130), ("11ad3fa6", 80.858)),
    "resnet101": (("63fe2227", 77.374), ("cd907fc2", 81.886)),
    "resnet152": (("394f9c45", 78.312), ("f82ba261", 82.284)),
    "wide_resnet50_2": (("95faca4d", 78.468), ("9ba9bcbe", 81.602)),
    "wide_resnet101_2": (("32ee1156", 78.848), ("d733dc28", 82.510)),
    "resnext50_32x4d": (("7cdf4587", 77.618), ("1a0047aa", 81.198)),
}

# As the hub's pages of the files give them.
_SHA256 = {
    "resnet18_l2_eps0.ckpt": "d762c58693a2ecaf93160060bb2c32493598540a08852fb3068e95e88f032623",
    "resnet18_l2_eps0.01.ckpt": "629a82377947785e5481eeaf4e22e3ca59a2eedeb4e385730ee2392b2678407d",
    "resnet18_l2_eps0.05.ckpt": "00912b1aa6d60cf7536b52762ed702e0b9cae822187200f42fe4f6a678771bed",
    "resnet18_l2_eps0.1.ckpt": "2477188559680d096a4eccf5bc7610317cab4b46a97094072d38a29a11bfa8fc",
    "resnet18_l2_eps0.25.ckpt": "2bed566c554755a0f6f82ddbe83c707d259801308f966e787bcd287f969c7911",
    "resnet18_l2_eps0.5.ckpt": "69a10462280f266ab855547fde0649ac909f06174ed8df83b8bf2ea0f6fc8150",
    "resnet18_l2_eps1.ckpt": "92e6c37af550167c7c49c77ad31aad027de4e1f47fbef57546a48ef43626ebcf",
    "resnet18_l2_eps3.ckpt": "b4315784a1a10257b05906aee94d6884678f7b77412d10100d7c05daa959eab0",
    "resnet18_l2_eps5.ckpt": "d3ef126afdf9144a22020988dc46f552a0c39347e954c34359a3cb6bf83df186",
    "resnet18_linf_eps0.5.ckpt": "48d5e933d4ec99b390a0b7c628a4303343f9517a46245cbd7d2f2c034cbd93ee",
    "resnet18_linf_eps1.0.ckpt": "b49800111d38197deefb0c236055fbdd9d91a0607e55d6cc0bce15504adc9582",
    "resnet18_linf_eps2.0.ckpt": "bf2611291cc5f792c7f8f17ff6f841f9a0ede32dbe575cbd5bc57233139ae8bd",
    "resnet18_linf_eps4.0.ckpt": "6f8ccef1ae4958c381617081e9e0fb5f50e7cccd4965192d1caa452fd6c5cd1e",
    "resnet50_l2_eps0.ckpt": "72d4a99582db5d7fa86c3fd2a089f0bfd6a10f69d635bca51f6ad72ac6b458f0",
    "resnet50_l2_eps0.01.ckpt": "53d7a7c09d2733b113e255ac9fc578091f44adb8d00eee274c0e71dd1f4dc41e",
    "resnet50_l2_eps0.03.ckpt": "e375df3bf07bf1360c04b0aff5cc19bb215e850b1af713327c87cf0353a5598f",
    "resnet50_l2_eps0.05.ckpt": "e09d8763fcf825542f07389a1904adf15930451b8661a0de209c3bc39828c2ea",
    "resnet50_l2_eps0.1.ckpt": "3298f8cf689e514d096df883ab491a11ee32c3b8d456d674add29d7b50721a43",
    "resnet50_l2_eps0.5.ckpt": "a5fc6fcc54946b73af7bd74289b0003cc9d2744fa0ff55c1a3d9fb2bce8fbd30",
    "resnet50_l2_eps1.ckpt": "09f5273a568830ae23caf9162a06f4831a920293e0da1801aa182289052dcf90",
    "resnet50_l2_eps3.ckpt": "380b14e6f9750bffa1447cf7017f65da4dc5ce71a3dd112f107515dcf7b14d9d",
    "resnet50_l2_eps5.ckpt": "c50db4bbd9a61bc0e0a33290e1f07a79080e16489aa5ada869efc88306f497be",
    "resnet50_linf_eps0.5.ckpt": "9612d8096ef5378b4a32746072f72fedcb02c7ff4b747bc7163274f7ec2f0fd8",
    "resnet50_linf_eps2.0.ckpt": "59f28de783a049cb4d91ba1c0a09c314db2cc4bb1e859566e023f842b02772ac",
    "resnet50_linf_eps4.0.ckpt": "9e62216975c111b8081481533b6142dec34be69abe5d90b54d7f860015c263db",
    "resnet50_linf_eps8.0.ckpt": "b907957f8e3ce209816813d8811c682e965a1b0f48455def828d35a4cc2953dc",
    "wide_resnet50_2_l2_eps0.01.ckpt": "598f5be2e552bba5c21e3581a68339f5166859d9a959a2c90ce1027ec4abd76c",
    "wide_resnet50_2_l2_eps0.05.ckpt": "c8f12d8ead34232f80d09ca681deba7c42ede5762a7aadd16b7894227b80f1d8",
    "resnext50_32x4d_l2_eps0.ckpt": "ad5676d3150b32bde27492d1bc2bc3f75c735b257b479034435eb0acee578604",
    "timm/resnet18.tv_in1k": "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    "timm/resnet50.tv_in1k": "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    "timm/wide_resnet50_2.tv_in1k": "df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c",
    "timm/resnext50_32x4d.tv_in1k": "c0d85cba49c0e9dedbcf6d4e572e2c5ea5eb68e9d64d0564811fd54d4f72939a",
}


def find_known(file_name: str, sha256: str = "", repo: str = "") -> KnownModel | None:
    """The known model that a file is, or by its name should be.

    A hash decides, whatever the file is called; then the repository with the file's name; then the name
    alone, if only one known model has it. Compare the result's `sha256` before you believe a name.
    """
    for known in KNOWN_MODELS:
        if sha256 and known.sha256 == sha256.lower():
            return known
    namesakes = [known for known in KNOWN_MODELS if known.file == file_name]
    here = [known for known in namesakes if repo and known.repo == repo]
    found = here or namesakes
    return found[0] if len(found) == 1 else None


def known_spec(known: KnownModel) -> ModelSpec:
    """What the model of a known file is, as far as that is known without it: the normalisation is ImageNet's
    where only the file has it."""
    return ModelSpec(
        architecture=known.architecture,
        num_classes=_NUM_CLASSES[known.dataset],
        image_size=known.image_size,
        mean=known.mean or IMAGENET_MEAN,
        std=known.std or IMAGENET_STD,
        norm=known.norm,
        eps=known.eps,
    )


def file_bytes(known: KnownModel) -> int:
    """Bytes of a known file, nearly: of its float32 weights, and of as many of momentum in those of training
    runs (.ckpt), whose ResNet-50s have 205 MB."""
    module = create_module(known.architecture, num_classes=_NUM_CLASSES[known.dataset])
    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), known.image_size))
    weights, statistics = (
        sum(4 * leaf.size for leaf in jax.tree.leaves(variables[kind])) for kind in ("params", "batch_stats")
    )
    return weights * (2 if known.file.endswith(".ckpt") else 1) + statistics


def known_models_table() -> str:
    """The known models as text, with what to type for each; no line has more than 110 characters."""
    lines = [
        "To import a model, pass its name, or the path of a file that you have:",
        "python launch.py --config=experiments/import_source.py --config.source=NAME --workdir=FOLDER",
    ]
    for (source, licence, dataset), group in itertools.groupby(
        KNOWN_MODELS, lambda known: (known.source, known.licence, known.dataset)
    ):
        rows = list(group)
        width = max(len(_name(known)) for known in rows)
        what = "" if rows[0].repo else "; pass the path of your copy"
        lines += ["", f"{dataset}, {source} ({licence}){what}"]
        lines += [f"{_name(known):{width}}  {_describe(known)}".rstrip() for known in rows]
    lines += [
        "",
        "Last column: % of the clean validation or test images, as published (RobustBench: of 5,000 images).",
        "l2 radii are for images in [0, 1]. *: the SHA-256 is pinned, another file of that name is refused.",
        "hf: names need pip install huggingface_hub. The links of MadryLab/robustness are dead.",
    ]
    return "\n".join(lines)


def _name(known: KnownModel) -> str:
    return f"hf:{known.repo}/{known.file}" if known.repo else known.file


def _describe(known: KnownModel) -> str:
    radius = f"{known.eps * 255:g}/255" if known.norm == "linf" else f"{known.eps:g}"
    trained = "natural" if known.norm == "none" else f"{known.norm} {radius}"
    accuracy = "-" if known.accuracy is None else f"{100 * known.accuracy:.2f}"
    return f"{known.architecture:16} {trained:12} {accuracy:>5} {'*' if known.sha256 else ''}"


def _radius(norm: str, eps: float) -> float:
    """From the publishers' notation to pixel units."""
    return eps / 255 if norm == "linf" else float(eps)


def _salman() -> Iterator[KnownModel]:
    source = "Salman et al. 2020, https://huggingface.co/madrylab/robust-imagenet-models"
    tables = ((_SALMAN_L2, "l2", _SALMAN_L2_EPS), (_SALMAN_LINF, "linf", _SALMAN_LINF_EPS))
    for table, norm, radii in (*tables, (_SALMAN_OTHER, "l2", (0, 3))):
        for architecture, accuracies in table.items():
            for eps, percent in zip(radii, accuracies, strict=True):
                file = f"{architecture}_{norm}_eps{eps}.ckpt"
                yield KnownModel(
                    *(file, "madrylab/robust-imagenet-models", architecture),
                    *(norm if eps else "none", _radius(norm, eps), "ImageNet", percent / 100),
                    *(_SHA256.get(file, ""), "MIT", source),
                )


def _robustness() -> Iterator[KnownModel]:
    source = "https://github.com/MadryLab/robustness"
    for file, (norm, eps, percent) in _ROBUSTNESS.items():
        cifar = file.startswith("cifar")
        yield KnownModel(
            *(file, "", "resnet50_cifar" if cifar else "resnet50", norm, _radius(norm, eps)),
            *("CIFAR-10" if cifar else "ImageNet", percent / 100, "", "MIT", source),
            image_size=32 if cifar else 224,
        )


def _robustbench() -> Iterator[KnownModel]:
    source = "https://github.com/RobustBench/robustbench"
    for file, (architecture, percent, size) in _ROBUSTBENCH.items():
        yield KnownModel(
            *(file, "", architecture, "linf", 4 / 255, "ImageNet", percent / 100, "", "MIT", source),
            *(IMAGENET_MEAN, IMAGENET_STD, size),
        )


def _torchvision(on_hub: bool) -> Iterator[KnownModel]:
    """The same weights twice: converted by timm, and as torchvision publishes them."""
    source = "https://huggingface.co/timm" if on_hub else "https://download.pytorch.org/models"
    for architecture, versions in _TORCHVISION.items():
        for version, (digits, percent) in zip(("tv", "tv2"), versions, strict=False):
            repo = f"timm/{architecture}.{version}_in1k" if on_hub else ""
            file = "model.safetensors" if on_hub else f"{architecture}-{digits}.pth"
            yield KnownModel(
                *(file, repo, architecture, "none", 0.0, "ImageNet", percent / 100),
                *(_SHA256.get(repo, ""), "BSD-3-Clause", f"torchvision's, {source}"),
                *(IMAGENET_MEAN, IMAGENET_STD),
            )


KNOWN_MODELS: tuple[KnownModel, ...] = (
    *_salman(),
    *_robustness(),
    *_robustbench(),
    *_torchvision(on_hub=True),
    *_torchvision(on_hub=False),
)
