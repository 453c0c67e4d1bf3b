"""Command line of advtransfer: `python launch.py --config=experiments/NAME.py[:ARG] --workdir=DIR`.

Without arguments it runs experiments/quickstart.py. Any key can be set: `--config.train.num_epochs=4`;
`--explain` lists them all. `--plan` prints what would run, and stops; `--multihost` joins the processes of a
pod or cluster. Exit codes:
0 done, or stopped by SIGTERM; 1 diverged; 2 the command, the config or the workdir is wrong, and nothing was
written; 3 the disk is full, or another process is lost; 4 a fault that nobody foresaw, whose traceback is in
a file; 130 interrupted by Ctrl-C. After 0, 3 and 130 the same command goes on.
"""

from advtransfer.main import run

if __name__ == "__main__":
    run()
