"""Every configuration key, with its unit and default."""

from __future__ import annotations

from ml_collections import ConfigDict

STAGES = ("source", "import", "transfer", "study", "evaluate", "interpret", "report")
NORMS = ("none", "l2", "linf")


def default() -> ConfigDict:
    """The configuration that experiments start from."""
    config = ConfigDict()
    config.stage = "study"  # one of STAGES
    config.seed = 0  # of initial weights, batch order, augmentation and attacks of the sources
    config.dtype = "auto"  # of networks' computation: float32 | bfloat16; auto: float32 on CPU only
    config.cache_dir = ""  # where drawn or decoded datasets are kept; "": the user's cache folder
    config.broken_images = "refuse"  # images that cannot be decoded: refuse | skip (and say which)
    # stage=import, transfer: a model by name, which is a folder, hf:REPO/FILE[@revision] or a PyTorch file.
    # stage=import: "list" prints the known robust models.
    config.source = ""
    config.verify = ""  # stage=import: the dataset to measure the imported model on; "": none
    config.models = ""  # stage=interpret: models by name, comma-separated
    config.data = ""  # stage=interpret: the dataset whose images are explained
    config.rows = ""  # stage=report: a file or folder of rows (CSV, Parquet, JSON lines)
    config.checkpoint = _checkpoint()
    config.train = _train()
    config.transfer = _transfer()
    config.study = _study()
    config.evaluate = _evaluate()
    config.interpret = _interpret()
    config.report = _report()
    return config.lock()


def _checkpoint() -> ConfigDict:
    """stage=import: what the user knows of a PyTorch file; defaults leave it to the file and the table."""
    checkpoint = ConfigDict()
    checkpoint.architecture = ""  # "": told from the names and shapes in the file
    checkpoint.weights = ""  # which of several networks in it, by key or prefix; "": an average before others
    checkpoint.num_classes = 0  # 0: the size of its head
    checkpoint.image_size = 0  # pixels; 0: 224, or 32 for a network with a CIFAR stem
    checkpoint.mean = ()  # per channel, of images in [0, 1]; (): the file's, or the publisher's
    checkpoint.std = ()
    checkpoint.norm = ""  # threat model of its training: none | l2 | linf; "": the table's
    checkpoint.eps = 0.0  # its radius, pixel units
    checkpoint.sha256 = ""  # the file is refused unless it has this hash; "": the table's, where known
    return checkpoint


def _train() -> ConfigDict:
    """How a source network is trained. A natural and a robust one may differ in norm and eps alone."""
    train = ConfigDict()
    train.dataset = "builtin:glyphs"
    # memory: decoded once, on the device; stream: decoded on the way; auto: stream what takes over 2 GB
    train.loading = "auto"
    train.num_workers = -1  # processes that decode a stream; -1: one a core; 0: threads
    train.architecture = "resnet_tiny"
    train.image_size = 16  # pixels
    train.mean = (0.5, 0.5, 0.5)  # per channel, of images in [0, 1]
    train.std = (0.25, 0.25, 0.25)
    train.norm = "none"  # threat model of adversarial training: none | l2 | linf
    train.eps = 0.0  # its radius, pixel units
    train.attack_steps = 3  # PGD-3 (Salman et al., 2020, appendix A)
    train.attack_step_ratio = 2 / 3  # step size divided by eps (same place)
    train.attack_random_start = False
    train.attack_batch_norm = "running"  # statistics that the attack sees: running | batch
    train.num_epochs = 8
    train.batch_size = 128  # over all devices
    train.num_parts = 1  # of a batch, one after the other, on devices too small for the whole
    train.learning_rate = 0.1
    train.schedule = "cyclic"  # constant | step | cosine | cyclic (optim.make_schedule)
    train.momentum = 0.9
    train.nesterov = False
    train.weight_decay = 5e-4
    train.label_smoothing = 0.0
    train.average_decay = 0.0  # of a moving average of the weights, which becomes the model; 0: none
    train.augmentation = _augmentation()
    train.sync_batch_norm = True  # BatchNorm statistics over all devices, not one by one
    train.save_every = 200  # steps
    train.keep = 2  # checkpoints
    train.log_every = 50  # steps
    train.validate_every = 0  # epochs; natural and adversarial accuracy on validation images; 0: never
    return train


def _transfer() -> ConfigDict:
    """How a network is fine-tuned on a target set; rate, schedule, decay and epochs are the paper's."""
    transfer = ConfigDict()
    transfer.target = "builtin:digits"
    # Of all its images: natural | low_pass (by way of 32² pixels) | grey | patch_shuffle | amplitude_swap |
    # edges | silhouette (data/views.py)
    transfer.view = "natural"
    # stage=transfer; -1: all, those included that are otherwise set aside for validation
    transfer.num_train_images = 200
    transfer.num_unfrozen_blocks = 0  # stage=transfer; -1: everything
    # stage=transfer; given: num_unfrozen_blocks; rule: of thumb, by the number of images;
    # cross_validation: on the training images (transfer/choose_k.py)
    transfer.choose_num_unfrozen_blocks = "given"
    transfer.num_folds = 5  # of the cross-validation
    # Subsets hold every class's share to within one image; False: one of every class, the rest at random
    transfer.stratified = True
    transfer.nested = True  # a subset contains the smaller ones of the same seed
    transfer.head_init = "torch"  # torch (uniform) | normal | zeros
    transfer.head_scale = 1.0  # standard deviation of head_init=normal
    transfer.frozen_batch_norm = "source"  # statistics of frozen layers: update | source | target
    # Mean and standard deviation that images are normalised with: source (the network's own) | target
    # (natural sources take those of the target's training images, as in the paper's code)
    transfer.input_norm = "source"
    transfer.num_epochs = 150
    transfer.max_steps = 0  # of a training, which then has fewer epochs, but one; 0: no limit
    transfer.evaluate_epochs = (150,)  # counted from 1; rows are written after each of them, and the last
    transfer.batch_size = 128  # with fewer images all of them
    transfer.learning_rate = 0.1
    transfer.schedule = "step"  # divided by 10 every third of the epochs
    transfer.momentum = 0.9
    transfer.nesterov = False
    transfer.weight_decay = 5e-4
    transfer.label_smoothing = 0.0
    transfer.augmentation = _augmentation()
    # Each image and its augmentations, drawn once, to choose from in every step: so the frozen part of the
    # network is computed once for all. 0: the augmentation is drawn anew in every step.
    transfer.num_views = 0
    return transfer


def _study() -> ConfigDict:
    """The grid: every source × target × view × num_train_images × num_unfrozen_blocks × seed is one trial."""
    study = ConfigDict()
    # Comma-separated: natural and NORM:EPS are trained by the recipe of config.train; else models by name.
    study.sources = "natural,l2:0.25"
    study.targets = ""  # comma-separated datasets; "": config.transfer.target
    study.views = ()  # of the targets' images; (): config.transfer.view
    study.num_train_images = (200, 400, 800)  # -1: all; with split=test as for transfer.num_train_images
    study.num_unfrozen_blocks = (0, 1)  # -1: everything
    study.num_seeds = 20
    study.seeds = ()  # the first num_seeds of them; (): 0, 1, ...
    study.fewer_seeds = ()  # pairs (n, number): with n images and more the first so many seeds only
    # Tried in all combinations for every source, target, n and k; the best on the validation split is
    # taken. (): the one of config.transfer.
    study.learning_rates = ()
    study.weight_decays = ()
    study.epochs = ()
    study.search_seeds = 3  # trials for each combination
    study.split = "test"  # what rows are measured on: test | validation (to choose hyper-parameters)
    study.group_size = 0  # trials compiled into one program; 0: all of one shape
    study.calibration = 30.0  # seconds that --plan may measure for, to predict the hours; 0: no prediction
    return study


def _evaluate() -> ConfigDict:
    """How a network's natural and adversarial accuracy is measured."""
    evaluate = ConfigDict()
    evaluate.model = ""  # stage=evaluate: a model by name
    evaluate.dataset = "builtin:glyphs"  # stage=evaluate
    evaluate.split = "test"
    evaluate.norm = "l2"  # of the attack; none measures natural accuracy only
    evaluate.eps = 0.25  # pixel units
    evaluate.num_steps = 20
    evaluate.step_ratio = 0.125  # step size divided by eps: 2.5 / num_steps (Madry et al., 2018)
    evaluate.num_restarts = 1
    evaluate.num_images = 0  # first images of the split; 0: all
    evaluate.batch_size = 256  # over all devices
    return evaluate


def _interpret() -> ConfigDict:
    """What is looked at in networks, with which settings; those of visualisation suit images of 16²."""
    interpret = ConfigDict()
    interpret.analyses = ("saliency", "visualisation", "influence", "shape")
    interpret.split = "test"  # of config.data
    interpret.num_images = 8  # shown in every row of pictures
    interpret.num_measured = 256  # images behind the numbers about gradients
    interpret.smooth_samples = 50  # noisy copies of an image, SmoothGrad
    interpret.smooth_noise = 0.15  # their standard deviation, as a share of the image's range
    interpret.baseline = 0.0  # of integrated gradients: a grey from 0 to 1
    interpret.integration_steps = 2048  # at most
    interpret.num_steps = 200  # of visualisation; the paper's at 224²: 1000 steps of 2, in pixels
    interpret.step_size = 0.1  # ℓ2, pixel units
    interpret.eps = 1000.0  # radius of the ℓ2 ball around the start, pixel units
    interpret.parameterisation = "fourier"  # pixels | fourier
    interpret.solver = "damped"  # of influence: damped | truncated | cg; the paper's: truncated
    interpret.damping = 0.0  # added to the Hessian's diagonal; 0: 5e-4 times num_train, for truncated none
    interpret.rcond = 0.05  # cut-off of solver=truncated
    interpret.num_train = 800  # training images that are ranked
    interpret.num_queries = 200  # images that they are ranked for
    interpret.cue_conflict = ""  # folder of SHAPE1-TEXTURE2.png, for networks of ImageNet's classes
    return interpret


def _report() -> ConfigDict:
    """What the report is made of, and what it says beside the rows."""
    report = ConfigDict()
    report.title = "Do robust sources transfer better?"
    report.command = ""  # what a reader types to get the report again; launch.py fills it in
    report.remarks = ()  # sentences for the reader, such as how hyper-parameters were chosen
    report.reference = "none"  # "paper": its published accuracies behind the figures against n (k = 3)
    report.accuracy_unit = "auto"  # of stage=report's rows: fraction | percent | auto: told from each file
    report.analyses = ()  # stage=study: of the sources it trains; some of config.interpret.analyses
    report.num_pictures = 8  # source images shown with adversarial examples of them, at most 8
    return report


def _augmentation() -> ConfigDict:
    return ConfigDict(
        {
            # What a paper does, instead of all keys below: none | utrera_color | salman | robustness
            # (AUGMENTATIONS in data/transforms.py); for transfer also utrera: utrera_color, or none for grey
            # targets.
            "preset": "",
            "crop_padding": 0,  # pixels, then a random crop of the old size
            "flip": False,  # left to right, half of the time
            "jitter": 0.0,  # brightness, contrast, saturation by a factor in 1 ± jitter
            "rotation": 0.0,  # degrees, uniform in ± rotation
            "lighting": 0.0,  # standard deviation of AlexNet's colour noise
            "resized_crop": 0.0,  # smallest share of the area of a random crop; 0: none
        }
    )
