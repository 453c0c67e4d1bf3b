"""Export a model as one file that runs without this package, by JAX on a CPU, an NVIDIA GPU or a TPU.

    python launch.py --config=experiments/export.py --config.export.model=runs/digits/model \
        --workdir=runs/file

writes `model.stablehlo`, which takes uint8 images of any size and number and gives logits;
`model.stablehlo.json` with the names of the classes; and `model.stablehlo.py`, which classifies files:

    pip install jax flatbuffers pillow
    python runs/file/model.stablehlo.py photo.jpg

In a program of yours:

    run = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
    logits = run(images)  # uint8 [N, S, S, 3], made squares as model.stablehlo.py does

With `--config.export.temperature=1.5`, such as stage=predict finds, it gives calibrated probabilities.
Measured on 2 cores of an Intel Xeon: a ResNet-50 takes 15 s and 102 MB.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "export"
    return config
