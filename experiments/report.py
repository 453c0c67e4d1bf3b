"""Summary table, figures and one HTML page from rows that anybody wrote.

    python launch.py --config=experiments/report.py --config.rows=runs/quickstart/rows.csv \
        --workdir=runs/report

Rows are CSV, Parquet or JSON lines, a file or a folder of them, with the columns source, source_norm,
source_eps, target, num_train_images, num_unfrozen_blocks, seed, epoch, train_accuracy, train_loss and
test_accuracy. Leaves `summary.csv`, `figures/` and `report.html` in the workdir.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "report"
    return config
