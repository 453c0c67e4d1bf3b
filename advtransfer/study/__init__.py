"""The study: a grid of trials, who they are, which of them are left to do, and the rows they leave.

A trial is one fine-tuning: (source, target, n images, k blocks, hyper-parameters, seed). Its identity is
the SHA-256 of all of that. Trials that differ in seed, learning rate and weight decay only form a group,
which runs as one compiled program and leaves one file of rows, written whole or not at all. Any number of
processes may run the same study in the same folder: each group is one's.
"""

from advtransfer.study.calibrate import measure_speed, predict_seconds
from advtransfer.study.claims import NoLocks, claim
from advtransfer.study.cluster import Cluster, call_each, connect, run_on
from advtransfer.study.plan import accelerator_hours, caches_of, format_seconds, pieces_of
from advtransfer.study.rows import finished_rows, history_rows
from advtransfer.study.run import StudyResult, run_cells, run_group, run_here, run_study, run_trials
from advtransfer.study.search import HyperParameters, Search, candidates, choose, with_choices
from advtransfer.study.trials import (
    Cell,
    Grid,
    Source,
    Start,
    Trial,
    check_trainings,
    flatten,
    group,
    make_cells,
    make_trial,
    make_trials,
    trial_steps,
)

__all__ = [
    "Cell",
    "Cluster",
    "Grid",
    "HyperParameters",
    "NoLocks",
    "Search",
    "Source",
    "Start",
    "StudyResult",
    "Trial",
    "accelerator_hours",
    "caches_of",
    "call_each",
    "candidates",
    "check_trainings",
    "choose",
    "claim",
    "connect",
    "finished_rows",
    "flatten",
    "format_seconds",
    "group",
    "history_rows",
    "make_cells",
    "make_trial",
    "make_trials",
    "measure_speed",
    "pieces_of",
    "predict_seconds",
    "run_cells",
    "run_group",
    "run_here",
    "run_on",
    "run_study",
    "run_trials",
    "trial_steps",
    "with_choices",
]
