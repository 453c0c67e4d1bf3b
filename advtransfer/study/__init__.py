"""The study: a grid of trials, who they are, which of them are left to do, and the rows they leave.

A trial is one fine-tuning: (source, target, n images, k blocks, hyper-parameters, seed). Its identity is
the SHA-256 of all of that. Trials that differ in seed, learning rate and weight decay only form a group,
which runs as one compiled program and leaves one file of rows, written whole or not at all. Any number of
processes may run the same study in the same folder: each group is one's.
"""

from advtransfer.study.claims import claim
from advtransfer.study.rows import finished_rows, history_rows
from advtransfer.study.run import run_group, run_trials
from advtransfer.study.trials import Source, Trial, group, make_recipe, make_trial, make_trials, num_steps

__all__ = [
    "Source",
    "Trial",
    "claim",
    "finished_rows",
    "group",
    "history_rows",
    "make_recipe",
    "make_trial",
    "make_trials",
    "num_steps",
    "run_group",
    "run_trials",
]
