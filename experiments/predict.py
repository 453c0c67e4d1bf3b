"""Classify new images with a model, and see how far its probabilities can be trusted.

    python launch.py --config=experiments/predict.py --config.predict.model=runs/digits/model \
        --config.predict.images=/photos/new --workdir=runs/new

Classifies every image in the folder and its subfolders, or one file. Writes `predictions.csv` (file, class,
probability, whether the network abstains, the next classes) and `report.html`, which shows the surest and
the least sure pictures, how well the probabilities are calibrated, and how often the network is right if it
abstains below a probability; `--config.predict.abstain_below=0.9` sets that, also in the same workdir again.

Probabilities are scaled with a temperature. It is fitted on the validation and test images of the dataset
that the model was fine-tuned on with experiments/transfer.py; for other models
`--config.predict.held_out=folder:/photos/labelled` names images that they were not trained on.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "predict"
    return config
