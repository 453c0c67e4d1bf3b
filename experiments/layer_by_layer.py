"""How many blocks are worth training? Accuracy against the number of frozen blocks (Yosinski et al., 2014).

    python launch.py --config=experiments/layer_by_layer.py --workdir=runs/layers
    python launch.py --config=experiments/layer_by_layer.py:16 --workdir=runs/layers-50 \
        --config.study.sources=FOLDER,FOLDER --config.study.targets=tfds:cifar10

The argument is the network's number of residual blocks: 16 for ResNet-50, 4 for the quickstart's network. k
runs from 0 (head alone) to all blocks, then everything is trained; 400 images, 10 seeds. The report plots
accuracy against k.
"""

from advtransfer import config as base


def get_config(num_blocks="4"):
    config = base.default()
    config.stage = "study"
    config.study.update(
        num_train_images=(400,), num_unfrozen_blocks=(*range(int(num_blocks) + 1), -1), num_seeds=10
    )
    config.transfer.update(batch_size=20, num_epochs=30, evaluate_epochs=(1, 3, 10, 30))
    return config
