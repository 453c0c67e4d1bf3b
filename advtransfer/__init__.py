"""Robust transfer learning in JAX: adversarially trained source networks, transferred to small target sets.

import advtransfer as at

model = at.load_model("runs/quickstart/sources/l2_0.25/model")
logits = at.predict(model, images)                          # uint8, or floats in [0, 1]; squares of any size
adversarial = at.pgd(at.logits_fn(model), images, labels, at.L2(eps=0.25))
scores = at.influence.last_layer_scores(...)                # how much each training image helps a prediction

Arrays of another rank, length or kind of dtype than a docstring names are refused before anything is
computed, with an AssertionError or a ValueError.
"""

from advtransfer import config, models, report, study, tasks
from advtransfer.analysis import head_bound, influence, matches, saliency, shape, visualise
from advtransfer.attacks import (
    L2,
    Linf,
    Unconstrained,
    auto_attack,
    cross_entropy,
    log_odds,
    make_attack,
    margin,
    pgd,
)
from advtransfer.calibration import Calibration, calibrate
from advtransfer.data import (
    Augmentation,
    Batch,
    Dataset,
    Split,
    load_dataset,
    read_images,
    render_glyphs,
    subset_indices,
)
from advtransfer.evaluate import Evaluation, evaluate, measure, predict, unseen
from advtransfer.models import (
    Model,
    ModelSpec,
    create_module,
    export,
    init_variables,
    load_model,
    logits_fn,
    save_model,
)
from advtransfer.publish import push_to_hub
from advtransfer.robustness import Curves, measure_robustness
from advtransfer.source import SourceRecipe, train_source
from advtransfer.study import Grid, Search, run_study
from advtransfer.torch_checkpoint import CheckpointError, export_torch_state_dict, import_torch_checkpoint
from advtransfer.train import TrainState, fit, make_train_step
from advtransfer.transfer import FineTuned, Recipe, fine_tune, fine_tune_many, reset_head

__version__ = "0.2.0.dev0"

__all__ = [
    "L2",
    "Augmentation",
    "Batch",
    "Calibration",
    "CheckpointError",
    "Curves",
    "Dataset",
    "Evaluation",
    "FineTuned",
    "Grid",
    "Linf",
    "Model",
    "ModelSpec",
    "Recipe",
    "Search",
    "SourceRecipe",
    "Split",
    "TrainState",
    "Unconstrained",
    "auto_attack",
    "calibrate",
    "config",
    "create_module",
    "cross_entropy",
    "evaluate",
    "export",
    "export_torch_state_dict",
    "fine_tune",
    "fine_tune_many",
    "fit",
    "head_bound",
    "import_torch_checkpoint",
    "influence",
    "init_variables",
    "load_dataset",
    "load_model",
    "log_odds",
    "logits_fn",
    "make_attack",
    "make_train_step",
    "margin",
    "matches",
    "measure",
    "measure_robustness",
    "models",
    "pgd",
    "predict",
    "push_to_hub",
    "read_images",
    "render_glyphs",
    "report",
    "reset_head",
    "run_study",
    "saliency",
    "save_model",
    "shape",
    "study",
    "subset_indices",
    "tasks",
    "train_source",
    "unseen",
    "visualise",
]
