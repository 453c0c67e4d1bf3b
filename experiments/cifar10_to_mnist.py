"""The quickstart's comparison on real images: CIFAR-10 sources, natural and ℓ2-robust, transferred to MNIST.

    TFDS_DATA_DIR=/prepared python launch.py --config=experiments/cifar10_to_mnist.py

Both datasets must be prepared (docs/datasets.md); `--config.transfer.target=tfds:kmnist` is another target.
The experiment suits two CPU cores: the network is the quickstart's, and sources train on 20 % of the training
images for eight epochs. ε and the fine-tuning recipe are also the quickstart's; nothing was tuned on these
images. benchmarks/RESULTS.md has the results.
"""

from advtransfer import config as base

REMARKS = (
    "By default ε, learning rate and epochs are the quickstart's; no image of these sets chose anything.",
)


def get_config():
    config = base.default()
    config.train.update(
        dataset="tfds:cifar10:train[:20%]",
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_epochs=8,
    )
    config.train.augmentation.update(crop_padding=4, flip=True)
    config.transfer.target = "tfds:mnist"
    config.transfer.batch_size = 20
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (1, 3, 10, 30)
    config.study.num_train_images = (20, 50, 100, 200, 400, 800)
    config.study.num_unfrozen_blocks = (0,)
    config.evaluate.num_images = 2000
    config.report.remarks = REMARKS
    return config
