"""Fine-tune one source network on one target set and look at the result.

    python launch.py --config=experiments/transfer.py --config.source=runs/l2/model --workdir=runs/digits

Trains the head alone on 200 handwritten digits. `--config.transfer.num_train_images=100` takes fewer images
(-1: all), `--config.transfer.num_unfrozen_blocks=1` also trains the last residual block. To choose the number
of blocks: `--config.transfer.choose_num_unfrozen_blocks=rule`, by a rule of thumb on the number of images, or
`=cross_validation`, on the training images alone; `--plan` says what that costs. Writes to the workdir
`model/`, `report.html` (accuracy by epoch and by class, confusion matrix, the most confident mistakes) with
its tables as CSV files, and `rows.csv`.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "transfer"
    config.transfer.batch_size = 20
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (1, 2, 3, 5, 10, 20, 30)
    return config
