"""The peer: torchvision's ResNet v1.5 in plain PyTorch, and its weights from ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from advtransfer.torch_checkpoint.export import torch_tensors


class Block(nn.Module):
    """A residual block; `module` is the `ResNet` of advtransfer whose sizes it follows."""

    def __init__(self, inputs: int, planes: int, stride: int, module: Any):
        super().__init__()
        width = planes * module.base_width // 64 * module.groups if module.bottleneck else planes
        outputs = 4 * planes if module.bottleneck else planes
        sizes = (  # inputs, outputs, kernel size, stride, groups
            [
                (inputs, width, 1, 1, 1),
                (width, width, 3, stride, module.groups),
                (width, outputs, 1, 1, 1),
            ]
            if module.bottleneck
            else [(inputs, planes, 3, stride, 1), (planes, planes, 3, 1, 1)]
        )
        self.depth = len(sizes)
        for i, (c_in, c_out, k, s, groups) in enumerate(sizes, start=1):
            conv = nn.Conv2d(c_in, c_out, k, s, k // 2, groups=groups, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.outputs = outputs

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = self.relu(y)
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class TorchResNet(nn.Module):
    """An advtransfer `ResNet` in PyTorch: NCHW images in [0, 1] -> logits."""

    def __init__(self, module: Any):
        super().__init__()
        self.register_buffer("mean", torch.tensor(module.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(module.std).view(1, 3, 1, 1))
        k, s = (3, 1) if module.cifar_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, module.width, k, s, k // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(module.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if module.cifar_stem else nn.MaxPool2d(3, 2, 1)
        channels = module.width
        for stage, size in enumerate(module.stage_sizes):
            blocks = []
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(channels, module.width * 2**stage, stride, module))
                channels = blocks[-1].outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(module.stage_sizes)
        self.fc = nn.Linear(channels, module.num_classes)

    def forward(self, images):
        x = (images - self.mean) / self.std
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def make_peer(module: Any, variables: dict[str, Any]) -> TorchResNet:
    """A network in PyTorch, with its weights."""
    peer = TorchResNet(module)
    tensors = {name: torch.from_numpy(array) for name, array in torch_tensors(module, variables).items()}
    peer.load_state_dict(tensors | {"mean": peer.mean, "std": peer.std})
    return peer
