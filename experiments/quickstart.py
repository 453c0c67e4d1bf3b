"""placeholder"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "study"
    config.transfer.batch_size = 20
    config.study.num_train_images = (20, 50, 100, 200, 400, 800)
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (1, 3, 10, 30)
    return config
