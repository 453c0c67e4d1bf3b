"""What networks look at: saliency, feature visualisation, influence and shape against texture, side by side.

    python launch.py --config=experiments/interpret.py --config.models=runs/quickstart/sources/natural,\
runs/quickstart/sources/l2_0.25 --config.data=builtin:digits --workdir=runs/interpret

Takes any number of models with the same image size. Where the data's classes are not a network's own, its own
prediction is explained, and for influence a new head is trained (recipe: config.transfer). Writes
`report.html` and a CSV file for every figure. `--plan` says what influence costs.

The settings suit networks of 16×16 images. `--config=experiments/interpret.py:paper` takes those of Utrera et
al. (2021) for ImageNet networks: 1000 steps of size 2 in pixels, and the truncated pseudo-inverse for 3,200
training images. `--config.interpret.cue_conflict=FOLDER` also measures the shape bias of networks with 1,000
classes.
"""

from advtransfer import config as base


def get_config(settings="small"):
    config = base.default()
    config.stage = "interpret"
    config.transfer.batch_size = 20
    config.transfer.num_epochs = 30
    config.transfer.evaluate_epochs = (30,)
    if settings == "paper":
        config.transfer.update(batch_size=128, num_epochs=150, evaluate_epochs=(150,))
        config.interpret.update(num_steps=1000, step_size=2.0, parameterisation="pixels")
        config.interpret.update(solver="truncated", num_train=3200)
    elif settings != "small":
        raise ValueError(f"unknown settings {settings!r}: small or paper")
    return config
