"""Train an ImageNet source: ResNet-50 for 90 epochs, natural or adversarial.

    python launch.py --config=experiments/source_imagenet.py:natural --workdir=runs/imagenet-natural
    python launch.py --config=experiments/source_imagenet.py:l2_3 --workdir=runs/imagenet-l2-3
    python launch.py --config=experiments/source_imagenet.py:linf_4 --workdir=runs/imagenet-linf-4

The argument is natural, l2_EPS, or linf_EPS in 255ths; natural and robust sources differ in the attack alone.
The recipe is that of Salman et al. (NeurIPS 2020, appendix A): 90 epochs of SGD with learning rate 0.1,
divided by 10 every 30, weight decay 1e-4, PGD-3 with steps of 2/3 ε; the augmentation and the batch of 256
are MadryLab/robustness's, and the learning rate scales with the batch size. `tfds:imagenet2012` must be
prepared (docs/datasets.md); `--config.train.dataset=folder:/photos` takes your own images. On a small device
`--config.train.num_parts=4` processes a batch in parts. Never run to its end: no accuracy is promised.
"""

from advtransfer import config as base


def get_config(source="natural"):
    config = base.default()
    config.stage = "source"
    config.train.update(
        dataset="tfds:imagenet2012",
        architecture="resnet50",
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_epochs=90,
        batch_size=256,
        schedule="step",
        weight_decay=1e-4,
        save_every=1000,
        validate_every=5,
    )
    config.train.learning_rate = config.train.get_oneway_ref("batch_size").to_float() * (0.1 / 256)
    config.train.augmentation.preset = "robustness"
    config.evaluate.update(norm="l2", eps=3.0, num_images=5000)
    base.set_source(config, source)
    return config
