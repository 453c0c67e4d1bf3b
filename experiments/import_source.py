"""A robust source from elsewhere: a PyTorch checkpoint becomes a model folder, without PyTorch.

    python launch.py --config=experiments/import_source.py --config.source=list
    python launch.py --config=experiments/import_source.py \
        --config.source=hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt --workdir=sources/l2-3
    python launch.py --config=experiments/import_source.py \
        --config.source=/downloads/imagenet_l2_3_0.pt --workdir=sources/l2-3

The first prints the known robust models. No code of the file is run. `--config.verify=tfds:imagenet_v2`,
or any dataset with the model's classes, measures what was imported, with `--config.evaluate.norm=l2
--config.evaluate.eps=3` under attack too. `config.checkpoint` takes what file and table do not say:
`--config.checkpoint.norm=linf --config.checkpoint.eps=0.0157`, or `--config.checkpoint.weights=student`
for one of several networks in a file. A network without a head is a source for stage=transfer. Leaves
`model/`, and `evaluation.json` if verified, in the workdir.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "import"
    config.evaluate.norm = "none"
    config.evaluate.batch_size = 64
    return config
