"""The names and shapes of ResNets in torchvision, and the recognition of networks by names and shapes.

As in torchvision's `models/resnet.py`: `layer4.2.conv3.weight` [O, I, H, W] corresponds to our
`params/layer4_2/conv3/kernel` [H, W, I, O], and `fc.weight` [out, in] to `params/fc/kernel` [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from advtransfer.models import ARCHITECTURES, ResNet, create_module
from advtransfer.torch_reader import CheckpointError, Tensor

# Patterns of names by which other networks are recognised, matched at the start of a name or after a dot. The
# first match counts.
_RESNET_VARIANTS = {
    r"layer1\.0\.(conv2|splat)\.bn0\.": "a ResNeSt",
    r"layer1\.0\.convs\.0\.": "a Res2Net",
    r"layer1\.0\.conv[12]\.paths\.": "an SK-ResNet",
    r"layer1\.0\.se\.conv\.": "an ECA-ResNet",
    r"layer1\.0\.se(_module)?\.": "an SE-ResNet",
    r"layer1\.0\.bn1\.(IN|BN)\.": "an IBN-ResNet",
    r"attnpool\.": "CLIP's ResNet, with a deep stem and attention pooling",
    r"stage2\.0\.branches\.": "an HRNet",
    r"layer\d\.0\.downsample\.2\.": "a ResNet-D (avg_down: average pooling in its shortcuts)",
    r"conv1\.6\.weight$": "a ResNet with a deep stem (timm's C, D, S and T variants)",
    r"\d\.filt$": "an anti-aliased ResNet",
}
_OTHERS = {
    r"block1\.layer\.0\.": "a WideResNet such as WRN-28-10",
    r"layer\.0\.block\.0\.(batchnorm|conv)_0\.": "a WideResNet such as WRN-28-10",
    r"(stages\.0\.blocks\.0\.norm3|block1\.unit01)\.": "a pre-activation ResNetV2 (BiT)",
    r"stages\.0\.0\.conv1(_1x1)?\.(gain|conv\.)": "a ResNet-like network in another layout of timm",
    r"denseblock1\.": "a DenseNet",
    r"features\.\d+\.squeeze\.": "a SqueezeNet",
    r"features\.1\.(conv|block)\.0\.0\.|layers\.8\.0\.layers\.": "a MobileNet or MNASNet",
    r"blocks\.1\.0\.conv_pw\.": "an EfficientNet, MobileNet or MNASNet",
    r"features\.1\.0\.block\.0\.0\.": "an EfficientNet",
    r"features\.1\.0\.layer_scale|stages\.0\.blocks\.0\.conv_dw\.|stages\.0\.0\.dwconv\.": "a ConvNeXt",
    r"stage2\.0\.branch1\.": "a ShuffleNet",
    r"inception3a\.": "a GoogLeNet",
    r"Mixed_5b\.|Conv2d_1a_3x3\.|features\.4\.branch0\.": "an Inception network",
    r"s1\.b1\.|trunk_output\.block1\.": "a RegNet",
    r"local_mp\.": "an XCiT",
    r"(layers|features)\.\d\.(blocks\.)?0\.attn\.relative_position_bias_table": "a Swin transformer",
    r"cls_token$|class_token$|patch_embed\.|conv_proj\.": "a vision transformer (ViT, DeiT or similar)",
    r"features\.1[1-9]\.weight": "a VGG",
    r"features\.0\.weight": "an AlexNet",
}


class Entry(NamedTuple):
    """The place of a torchvision tensor in our variables."""

    path: tuple[str, ...]  # ("params", "layer1_0", "conv1", "kernel")
    shape: tuple[int, ...]  # in torch: [O, I, H, W] of a convolution, [out, in] of the head


class _Signature(NamedTuple):
    """The properties that distinguish the architectures."""

    bottleneck: bool
    stage_sizes: tuple[int, ...]
    stem: int  # kernel size
    width: int
    inner: int  # channels of the first block's second convolution
    group: int  # input channels of each group of that convolution


def layout(module: ResNet) -> dict[str, Entry]:
    """The tensors of a network by torchvision's names, in its order, without num_batches_tracked."""
    entries: dict[str, Entry] = {}

    def add_conv(name: str, path: tuple[str, ...], *shape: int) -> None:
        entries[f"{name}.weight"] = Entry(("params", *path, "kernel"), shape)

    def add_norm(name: str, path: tuple[str, ...], size: int) -> None:
        for leaf, collection, ours in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            entries[f"{name}.{leaf}"] = Entry((collection, *path, ours), (size,))

    kernel_size = 3 if module.cifar_stem else 7
    add_conv("conv1", ("conv1",), module.width, len(module.mean), kernel_size, kernel_size)
    add_norm("bn1", ("bn1",), module.width)
    channels = module.width
    for stage, i in ((s, i) for s, size in enumerate(module.stage_sizes) for i in range(size)):
        name, ours = f"layer{stage + 1}.{i}", f"layer{stage + 1}_{i}"
        planes = module.width * 2**stage
        shapes = [(planes, channels, 3, 3), (planes, planes, 3, 3)]
        if module.bottleneck:
            inner, features = planes * module.base_width // 64 * module.groups, 4 * planes
            group = inner // module.groups
            shapes = [(inner, channels, 1, 1), (inner, group, 3, 3), (features, inner, 1, 1)]
        for number, shape in enumerate(shapes, start=1):
            add_conv(f"{name}.conv{number}", (ours, f"conv{number}"), *shape)
            add_norm(f"{name}.bn{number}", (ours, f"bn{number}"), shape[0])
        features = shapes[-1][0]
        if channels != features:
            add_conv(f"{name}.downsample.0", (ours, "downsample_conv"), features, channels, 1, 1)
            add_norm(f"{name}.downsample.1", (ours, "downsample_bn"), features)
        channels = features
    entries["fc.weight"] = Entry(("params", "fc", "kernel"), (module.num_classes, channels))
    entries["fc.bias"] = Entry(("params", "fc", "bias"), (module.num_classes,))
    return entries


def infer_architecture(tensors: Mapping[str, Tensor]) -> str:
    """The key of `ARCHITECTURES` with these names and shapes.

    Some other networks have the names and shapes of a ResNet-50: timm's resnetaa50 and resnetblur50, which
    blur before subsampling, and variants with the stride in the first 1×1 convolution.

    Raises:
        CheckpointError: the tensors are not those of a supported ResNet.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = _signature(shapes)
    if found is None:
        raise CheckpointError(f"no ResNet was found: the first names are {brief_list(shapes)}")
    if "bn1.weight" not in shapes and "layer1.0.bn1.weight" in shapes:
        raise CheckpointError(
            "it is a pre-activation ResNet (no bn1 after its stem): only torchvision's ResNets are supported"
        )
    if not any(name.endswith(".running_mean") for name in shapes):
        raise CheckpointError(
            "it is a ResNet without BatchNorm (no running_mean): only torchvision's ResNets are supported"
        )
    for architecture in ARCHITECTURES:
        entries = layout(create_module(architecture))
        if found == _signature({name: entry.shape for name, entry in entries.items()}):
            return architecture
    inner = f"3×3 convolutions of {found.inner // found.group} × {found.group} channels, "
    raise CheckpointError(
        f"it is a {'bottleneck' if found.bottleneck else 'basic'} ResNet with stages "
        f"{'-'.join(map(str, found.stage_sizes))}, width {found.width}, {inner if found.bottleneck else ''}"
        f"stem {found.stem}×{found.stem}; supported: {', '.join(ARCHITECTURES)}"
    )


def _signature(shapes: Mapping[str, tuple[int, ...]]) -> _Signature | None:
    sizes: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(r"layer([1-9])\.([0-9]{1,3})\.conv1\.weight", name):
            stage, i = map(int, match.groups())
            sizes[stage] = max(sizes.get(stage, 0), i + 1)
    stem, second = (shapes.get(name, ()) for name in ("conv1.weight", "layer1.0.conv2.weight"))
    if not sizes or len(stem) != 4 or len(second) != 4 or 0 in second:
        return None
    return _Signature(
        bottleneck="layer1.0.conv3.weight" in shapes,
        stage_sizes=tuple(sizes.get(stage, 0) for stage in range(1, max(sizes) + 1)),
        stem=stem[2],
        width=stem[0],
        inner=second[0],
        group=second[1],
    )


def name_other(names: Iterable[str], has_resnet: bool) -> str | None:
    """The kind of network (with article) that the names of a state dict belong to if it is not a torchvision
    ResNet; only variants of it where `has_resnet`, as the names include those of one."""
    text = "\n".join(name for name in names if len(name) < 200)
    for pattern, kind in (_RESNET_VARIANTS if has_resnet else _RESNET_VARIANTS | _OTHERS).items():
        if re.search(rf"(?:^|\.)(?:{pattern})", text, re.MULTILINE):
            return kind
    return None


def is_inside(name: str) -> bool:
    """Whether torchvision's name of a tensor is that of a layer before the global pooling."""
    return re.match(r"(conv1|bn1|layer\d+)\.", name) is not None


def misfits(tensors: Mapping[str, Tensor], module: ResNet, *, head: bool) -> list[str]:
    """The reasons why tensors (by torchvision's names) do not fit `module`, one phrase per kind of problem.

    Additional tensors are a problem if they belong to a layer before the global pooling or are convolutions,
    such as attention on the stem. Others, such as a projection head, are not. `head`: whether fc is required.
    """
    want = {name: entry for name, entry in layout(module).items() if head or is_inside(name)}
    missing = [name for name in want if name not in tensors]
    unexpected = [
        name
        for name, tensor in tensors.items()
        if name not in want
        and (is_inside(name) or (len(tensor.shape) == 4 and tensor.shape != (1, 3, 1, 1)))
        and not name.startswith("fc.")
    ]
    wrong = [
        f"{name} has shape {str(tensors[name].shape)[:100]}, not {entry.shape}"
        for name, entry in want.items()
        if name in tensors and tensors[name].shape != entry.shape
    ]
    problems = [
        f"missing {brief_list(missing)}" if missing else "",
        f"unexpected {brief_list(unexpected)}" if unexpected else "",
        brief_list(wrong, quote=False),
    ]
    return [problem for problem in problems if problem]


def brief_list(names: Iterable[str], *, quote: bool = True) -> str:
    """The first eight names, escaped by `brief` if `quote`, and the number of the others."""
    names = list(names)
    shown = [brief(name) if quote else name for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def brief(name: object) -> str:
    """A name from a file: unusual characters escaped, at most 100 characters."""
    text = str(name)
    if not re.fullmatch(r"[\w./-]{1,100}", text, re.ASCII):
        text = ascii(text[:100]) + ("..." if len(text) > 100 else "")
    return text
