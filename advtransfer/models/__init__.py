"""Models: the ResNet family, how its convolutions are lowered, and a model's folder on disk."""

from advtransfer.models.bundle import (
    Model,
    ModelSpec,
    compute_dtype,
    digest,
    identity,
    load_model,
    logits_fn,
    package_versions,
    save_model,
)
from advtransfer.models.cost import block_flops, flops_per_weight
from advtransfer.models.export import export
from advtransfer.models.resnet import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResNet,
    create_module,
    init_variables,
)

__all__ = [
    "ARCHITECTURES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Model",
    "ModelSpec",
    "ResNet",
    "block_flops",
    "compute_dtype",
    "create_module",
    "digest",
    "export",
    "flops_per_weight",
    "identity",
    "init_variables",
    "load_model",
    "logits_fn",
    "package_versions",
    "save_model",
]
