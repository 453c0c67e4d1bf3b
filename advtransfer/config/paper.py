"""The grid of Utrera et al., "Adversarially-trained deep nets transfer better" (ICLR 2021)."""

from __future__ import annotations

from ml_collections import ConfigDict

# ImageNet ResNet-50s: torchvision's first one, and those trained against ℓ2 ε = 3, ℓ∞ ε = 4/255 and 8/255.
_SOURCES = (
    "hf:timm/resnet50.tv_in1k/model.safetensors",
    "hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt",
    "hf:madrylab/robust-imagenet-models/resnet50_linf_eps4.0.ckpt",
    "hf:madrylab/robust-imagenet-models/resnet50_linf_eps8.0.ckpt",
)
_TARGETS = ("cifar10", "cifar100", "svhn_cropped", "mnist", "fashion_mnist", "kmnist")


def set_paper_grid(config: ConfigDict) -> None:
    """Makes config.study the paper's 14,400 models: 4 sources, 6 targets, 4 k, 5 n × 20 and 5 n × 10 seeds.

    What its code calls 6 blocks are the last nine. How its seeds are shared out among the n is told by the
    sum alone; their numbers are those of its code.
    """
    config.stage = "study"
    config.study.update(
        sources=",".join(_SOURCES),
        targets=",".join(f"tfds:{name}" for name in _TARGETS),
        num_train_images=(100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, -1),
        num_unfrozen_blocks=(0, 1, 3, 9),
        num_seeds=20,
        seeds=tuple(20_000_000 + 100_000 * i for i in range(20)),
        fewer_seeds=((3200, 10),),
    )
    config.transfer.update(num_epochs=150, evaluate_epochs=(1, 11, 21, 41, 81, 150), stratified=False)
    config.report.reference = "paper"
