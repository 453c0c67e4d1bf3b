"""Train a CIFAR-10 source: ResNet-18 with a CIFAR stem, natural or adversarial.

    python launch.py --config=experiments/source_cifar10.py:natural --workdir=runs/cifar-natural
    python launch.py --config=experiments/source_cifar10.py:l2_0.5 --workdir=runs/cifar-l2

The argument is natural, l2_EPS, or linf_EPS in 255ths; natural and robust sources differ in the attack alone.
The recipe is MadryLab/robustness's for CIFAR: SGD with learning rate 0.1, divided by 10 every third of 150
epochs, weight decay 5e-4, batch 128, PGD-7 with steps of ε/5, random crop, flip, colour jitter and rotation.
`tfds:cifar10` must be prepared (docs/datasets.md); `--config.train.dataset=tfds:/prepared/dir` names its
folder. A network that two cores can train: `--config.train.architecture=resnet_tiny
--config.train.num_epochs=8 --config.train.schedule=cyclic`.
"""

from advtransfer import config as base


def get_config(source="natural"):
    config = base.default()
    config.stage = "source"
    config.train.update(
        dataset="tfds:cifar10",
        architecture="resnet18_cifar",
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_epochs=150,
        schedule="step",
        attack_steps=7,
        attack_step_ratio=0.2,
        validate_every=10,
    )
    config.train.augmentation.preset = "utrera_color"  # robustness takes the same for CIFAR
    config.evaluate.update(norm="l2", eps=0.5, num_images=2000)
    base.set_source(config, source)
    return config
