"""Summary table, figures and one HTML page from result rows, of this library or any other program.

    python launch.py --config=experiments/report.py --config.rows=runs/quickstart/rows.csv \
        --workdir=runs/report

Rows are CSV, Parquet or JSON lines, a file or a folder of them, with the columns source, source_norm,
source_eps, target, num_train_images, num_unfrozen_blocks, seed, epoch, train_accuracy, train_loss and
test_accuracy; rows that cannot be used are left out and listed. Writes to the workdir `report.html`,
`figures/` and `summary.csv`; `ratios.csv`, how many times fewer images and epochs a robust source needs;
`best_k.csv`; and `table_kK.csv`, in the layout of the paper's table. `--config.report.reference=paper` draws
the paper's numbers behind the figures against n. 96,000 rows (the paper's grid with 20 seeds) take 13 to 15 s
of one CPU core.
"""

from advtransfer import config as base


def get_config():
    config = base.default()
    config.stage = "report"
    return config
