"""Fine-tune one source network on one small target set.

    python launch.py --config=experiments/transfer.py --config.source=runs/l2/model --workdir=runs/digits

Trains the head alone on 200 handwritten digits; `--config.transfer.num_train_images=100
--config.transfer.num_unfrozen_blocks=1` takes fewer images and one residual block more. Leaves `model/` and
`rows.csv` (accuracy on the subset and on the test split by epoch) in the workdir.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "transfer"
    config.transfer.batch_size = 20
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (1, 3, 10, 30)
    return config
