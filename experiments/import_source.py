"""Import a robust source: a PyTorch checkpoint becomes a model folder, without PyTorch.

    python launch.py --config=experiments/import_source.py --config.source=list
    python launch.py --config=experiments/import_source.py \
        --config.source=hf:madrylab/robust-imagenet-models/resnet50_l2_eps3.ckpt --workdir=sources/l2-3
    python launch.py --config=experiments/import_source.py \
        --config.source=/downloads/imagenet_l2_3_0.pt --workdir=sources/l2-3

The first command prints the known robust models. No code of the file is run.
`--config.verify=tfds:imagenet_v2`, or any dataset with the model's classes, measures the imported model; with
`--config.evaluate.norm=l2 --config.evaluate.eps=3` also under attack. `config.checkpoint` sets what neither
the file nor the table says, such as `--config.checkpoint.norm=linf --config.checkpoint.eps=0.0157`;
`--config.checkpoint.weights=student` chooses one of several networks in a file. A network without a head can
be fine-tuned (stage=transfer), not measured. Writes `model/` to the workdir, and `evaluation.json` if
verified.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "import"
    config.evaluate.norm = "none"
    config.evaluate.batch_size = 64
    return config
