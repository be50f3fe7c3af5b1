"""The flags of the three scripts: names as in the field (MTT, FTD, ATT), one declaration each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from networks import CROSS_ARCHITECTURE, check_name, elsewhere
from utils.compute.device import DEVICES, PRECISIONS, parse_device
from utils.compute.sharpness import Sharpness
from utils.config.fields import option
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import DATASETS
from utils.data.decode import FITS
from utils.data.foreign.content import LABELS_ARE, PARTS, SPACES, Stated
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.recipe import EPOCHS
from utils.experts.easy_first import PUBLISHED_EPOCHS, EasyFirst, EasyFirstOptions
from utils.measure.selection import SELECTIONS
from utils.methods.registry import DEFAULT_METHOD, METHODS, MethodOptions

_DATA, _EXPERTS, _METHOD = "data", "experts", "method"
_SET, _EVAL, _FILES, _RUN = "synthetic set", "evaluation", "files", "run"
_FOREIGN = "a set of another code, where its file does not say"
_SPEED = "speed and memory (the same result up to rounding)"
_AUTO: dict[str, Any] = {"auto": True, "may_change": True}
_MODELS = (
    "ConvNet, by depth D1 ... D8 (ConvNetD3), width W32 ... W1024, activation AS AR AL, norm NN BN "
    "LN IN GN or pooling NP MP AP; ConvNetKIP, also KIPW32 ... KIPW512; ResNet18 and VGG11, each "
    "also BN, ResNet18_AP, ResNet18BN_AP; AlexNet, AlexCifarNet, MLP, LeNet; or from elsewhere: "
    f"{elsewhere.FORMS}"
)


@dataclass(frozen=True)
class DataOptions:
    dataset: str = option("CIFAR10", "data set", group=_DATA, choices=DATASETS)
    subset: str | None = option(
        None, "ten classes of ImageNet", group=_DATA, choices=IMAGENET_SUBSETS
    )
    res: int | None = option(
        None,
        "image side in pixels, for ImageNet (128), folder (32) and digits (8); the others have one",
        group=_DATA,
        minimum=8,
        maximum=4096,
        noun="a whole number: images are square, and --fit pad or --fit squeeze makes them so",
    )
    fit: str = option(
        "crop",
        "what becomes of pictures that are not square: cut to their middle, kept between black "
        "bars, or distorted",
        group=_DATA,
        choices=FITS,
    )
    val_fraction: float = option(
        0.0,
        "part of the training images of each class to hold out, from experts and distillation "
        "alike",
        group=_DATA,
        minimum=0,
        maximum=0.9,
    )
    test_fraction: float = option(
        0.0,
        "part of the training images of each class to test on, for a folder without test images",
        group=_DATA,
        minimum=0,
        maximum=0.9,
    )
    zca: bool = option(False, "ZCA whitening instead of mean/std normalisation", group=_DATA)
    data_path: str = option("data", "folder of the data set", group=_DATA, may_change=True)
    seed: int = option(0, "seed of every random stream", group=_RUN, minimum=0)


@dataclass(frozen=True)
class DsaOptions:
    dsa: bool = option(True, "augment the training of networks with DSA", group=_DATA)
    dsa_strategy: str = option(
        DSA_STRATEGY, "groups of DSA, one drawn a batch, or none", group=_DATA, check=parse_strategy
    )


@dataclass(frozen=True)
class ExecutionOptions:
    device: str | None = option(
        None,
        f"where networks compute: {DEVICES}; auto: CUDA where it is there, else the CPU",
        group=_SPEED,
        check=parse_device,
        **_AUTO,
    )
    compile: str = option(
        "auto",
        "compile inner and training steps; auto: where the run is long enough to win it back",
        group=_SPEED,
        choices=("auto", "on", "off"),
        may_change=True,
    )
    cuda_graphs: str = option(
        "auto",
        "replay inner and training steps as CUDA graphs; auto: and go on without where that fails",
        group=_SPEED,
        choices=("auto", "on", "off"),
        may_change=True,
    )
    precision: str | None = option(
        None,
        "precision of matrix products and convolutions (default: tf32 on CUDA, fp32 elsewhere)",
        group=_SPEED,
        choices=PRECISIONS,
        may_change=True,
    )


@dataclass(frozen=True)
class RoomOptions:
    dry_run: bool = option(
        False, "print what would be done and needed, and end", group=_RUN, may_change=True
    )
    force: bool = option(
        False, "go on although memory or disk seem too small", group=_RUN, may_change=True
    )


@dataclass(frozen=True)
class BufferOptions(EasyFirstOptions, RoomOptions, ExecutionOptions, DsaOptions, DataOptions):
    model: str = option(
        "ConvNet", f"network of the experts: {_MODELS}", group=_EXPERTS, check=check_name
    )
    num_experts: int = option(
        100, "experts in all", group=_EXPERTS, minimum=1, maximum=100_000, may_change=True
    )
    first_expert: int = option(
        0,
        "train the experts from this one to num_experts - 1; a multiple of save_interval",
        group=_EXPERTS,
        minimum=0,
        may_change=True,
    )
    train_epochs: int = option(50, "epochs of an expert", group=_EXPERTS, minimum=1)
    batch_train: int = option(256, "batch size", group=_EXPERTS, minimum=1)
    lr_teacher: float = option(0.01, "learning rate", group=_EXPERTS, above=0)
    mom: float = option(0.0, "momentum", group=_EXPERTS, minimum=0)
    l2: float = option(0.0, "weight decay", group=_EXPERTS, minimum=0)
    decay: bool = option(
        False, "multiply the learning rate by 0.1 at half of the epochs", group=_EXPERTS
    )
    flat: bool = option(False, "sharpness-aware steps, for flat trajectories (FTD)", group=_EXPERTS)
    rho: float = option(
        0.01, "how far a flat step looks around, relative to the weights", group=_EXPERTS, minimum=0
    )
    alpha: float = option(
        0.4,
        "how much a flat step takes away of the gradient's part orthogonal to that further on",
        group=_EXPERTS,
        minimum=0,
    )
    experts_at_once: int | None = option(
        None, "experts trained together in a process", group=_SPEED, minimum=1, **_AUTO
    )
    buffer_path: str = option(
        "buffers", "folder of expert trajectories", group=_FILES, may_change=True
    )
    save_interval: int = option(10, "experts in one buffer file", group=_FILES, minimum=1)

    @staticmethod
    def presets(known: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """What experts trained easy-first have instead of the common defaults."""
        epochs = {"train_epochs": PUBLISHED_EPOCHS} if known.get("easy_first") else {}
        return "--easy_first", epochs

    @property
    def sharpness(self) -> Sharpness | None:
        return Sharpness(self.rho, self.alpha) if self.flat else None

    @property
    def by_difficulty(self) -> EasyFirst | None:
        """Which images the epochs see; None for all. UserError where the flags contradict."""
        if not self.easy_first:
            return None
        return EasyFirst.of(
            dataset=self.dataset,
            train_epochs=self.train_epochs,
            share=self.easy_share,
            all_from=self.all_from,
            drop_after=self.drop_after,
            drop_easiest=self.drop_easiest,
        )


@dataclass(frozen=True)
class EvaluationOptions(RoomOptions, ExecutionOptions):
    num_eval: int = option(
        5,
        "networks trained per evaluation",
        group=_EVAL,
        minimum=1,
        maximum=10_000,
        may_change=True,
    )
    epoch_eval_train: int = option(
        EPOCHS, "epochs that train an evaluation network", group=_EVAL, minimum=1, may_change=True
    )
    eval_at_once: int | None = option(
        None, "evaluation networks trained together in a process", group=_SPEED, minimum=1, **_AUTO
    )
    eval_mode: str = option(
        "S",
        "S: the distillation model; M: ConvNet, ResNet18, VGG11, AlexNet",
        group=_EVAL,
        choices=("S", "M"),
        may_change=True,
    )


@dataclass(frozen=True)
class SetOptions(EvaluationOptions, DsaOptions, DataOptions):
    """What is learned, by which method: the flags that all methods have."""

    method: str = option(
        DEFAULT_METHOD,
        "; ".join(f"{name}: {spec.summary}" for name, spec in METHODS.items()),
        group=_METHOD,
        choices=METHODS,
        may_change=True,
    )
    model: str = option(
        "ConvNetD3", f"network of experts and students: {_MODELS}", group=_EXPERTS, check=check_name
    )
    ipc: int = option(1, "images per class", group=_SET, minimum=1)
    pix_init: str = option(
        "real",
        "start from random real images, from those that experts get right (DATM), or from noise",
        group=_SET,
        choices=("real", "samples_predicted_correctly", "noise"),
    )
    lr_img: float = option(1000.0, "learning rate of the images", group=_SET, above=0, found=True)
    max_update: float | None = option(
        None,
        "the most that an outer step moves what is learned: root mean square, of images in their "
        "standard deviations, of syn_lr by its logarithm (default: no bound, or 0.1 where lr_img "
        "is found)",
        group=_SET,
        above=0,
        found="lr_img",
    )
    ema_decay: float = option(
        0.999, "decay of the moving average of the images", group=_SET, minimum=0, maximum=1
    )


@dataclass(frozen=True)
class DistillOptions(MethodOptions, SetOptions):
    micro_batch: int | None = option(
        None,
        "work through inner batches in pieces of this many images: same gradient, less memory",
        group=_SPEED,
        minimum=1,
        **_AUTO,
    )
    no_aug: bool = option(False, "no DSA in the outer steps", group=_METHOD)
    Iteration: int = option(
        5000, "outer steps", group=_RUN, minimum=0, alias="iterations", may_change=True
    )
    eval_it: int = option(
        100, "outer steps between evaluations; 0 = never", group=_EVAL, minimum=0, may_change=True
    )
    select: str = option(
        "test",
        "the best iteration: by test accuracy (as the field does), by that on the images held out "
        "by val_fraction, or those of a folder val beside test, or the last",
        group=_EVAL,
        choices=("test", "val", "last"),
    )
    batch_train: int = option(256, "batch size of evaluation networks", group=_EVAL, minimum=1)
    buffer_path: str = option(
        "buffers", "folder of expert trajectories", group=_FILES, may_change=True
    )
    skip_bad_buffers: bool = option(
        False, "go on without buffer files that are damaged", group=_FILES, may_change=True
    )
    save_path: str = option(
        "results", "folder of the run directories", group=_FILES, may_change=True
    )
    save_it: int | None = option(
        None,
        "outer steps between saved sets (default: eval_it; 0 = never)",
        group=_FILES,
        minimum=0,
        may_change=True,
    )
    checkpoint_it: int | None = option(
        None,
        "outer steps between checkpoints, which are written every 10 minutes in any case (default: "
        "eval_it)",
        group=_FILES,
        minimum=1,
        may_change=True,
    )
    run_name: str | None = option(
        None,
        "name of the run directory (default: date and time); one that is there is continued",
        group=_FILES,
        may_change=True,
    )
    restart: bool = option(
        False,
        "begin anew in a new directory, run_name with a number behind it",
        group=_FILES,
        may_change=True,
    )
    on_divergence: str = option(
        "stop",
        "stop, or rewind: from the last checkpoint with half the offending rate, up to 3 times",
        group=_RUN,
        choices=("stop", "rewind"),
        may_change=True,
    )
    config: str | None = option(
        None,
        "YAML file of defaults (default: configs/<dataset>/ipc<ipc>.yaml)",
        group=_RUN,
        alias="cfg",
        may_change=True,
    )
    wandb: str = option(
        "disabled",
        "log to Weights & Biases too",
        group=_RUN,
        choices=("disabled", "offline", "online"),
        may_change=True,
    )

    @staticmethod
    def presets(known: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """What the method among the `known` values has instead of the common defaults."""
        method = known.get("method", DEFAULT_METHOD)
        return f"--method {method}", METHODS[method].presets

    @property
    def evaluation_models(self) -> tuple[str, ...]:
        return CROSS_ARCHITECTURE if self.eval_mode == "M" else (self.model,)

    @property
    def sets_it(self) -> int:
        """Outer steps between saved sets; 0 = never."""
        return self.eval_it if self.save_it is None else self.save_it


@dataclass(frozen=True)
class ForeignSetOptions:
    """What the files of other codes do not say of a distilled set; see `Stated`."""

    dataset: str | None = option(None, "data set of the set", group=_FOREIGN, choices=DATASETS)
    subset: str | None = option(
        None, "ten classes of ImageNet", group=_FOREIGN, choices=IMAGENET_SUBSETS
    )
    space: str | None = option(
        None,
        "what its images are: mean and std taken out, whitened, or pixels in [0, 1]",
        group=_FOREIGN,
        choices=SPACES,
    )
    statistics: list[str] | None = option(
        None,
        "mean and std of normalised images: mtt (as here), dc, or the means and then the standard "
        "deviations of all channels",
        group=_FOREIGN,
    )
    lr: float | None = option(
        None, "learning rate (default: the file's, or 0.01)", group=_FOREIGN, above=0
    )
    labels_are: str | None = option(
        None, "what soft labels are", group=_FOREIGN, choices=LABELS_ARE
    )
    label_dir: str | None = option(
        None, "file of its labels (default: labels_<tag>.pt beside images_<tag>.pt)", group=_FOREIGN
    )
    lr_dir: str | None = option(
        None, "file of its rate (default: lr_<tag>.pt beside images_<tag>.pt)", group=_FOREIGN
    )
    factor: int | None = option(
        None,
        "a stored image holds factor x factor smaller ones (IDC, NCFM)",
        group=_FOREIGN,
        minimum=1,
        maximum=8,
    )
    experiment: int | None = option(
        None, "which one of several in a file, from 0 on (DC, DM)", group=_FOREIGN, minimum=0
    )
    parts: str | None = option(
        None,
        "each file of the folder is a part of one set: some of the classes, or images of every "
        "class",
        group=_FOREIGN,
        choices=PARTS,
    )

    def stated(self, *, data_path: str | None, model: str | None) -> Stated:
        """Collect all that is said of the set."""
        values = {each.name: getattr(self, each.name) for each in fields(ForeignSetOptions)}
        return Stated(
            **values | {"statistics": tuple(self.statistics or ())},
            data_path=data_path or DataOptions.data_path,
            model=model,
        )


@dataclass(frozen=True)
class ConvertOptions(ForeignSetOptions):
    source: str = option(
        "", "distilled set of another code, a file or a folder", group=_FILES, positional=True
    )
    out: str = option("", "the file to write, distilled_<tag>.pt", group=_FILES, positional=True)
    model: str | None = option(
        None,
        "network that the set is for (default: the ConvNet of its size)",
        group=_FOREIGN,
        check=check_name,
    )
    data_path: str = option("data", "folder of the data set", group=_DATA)


@dataclass(frozen=True)
class EvalOptions(ForeignSetOptions, EvaluationOptions):
    distilled: str = option(
        "",
        "distilled set, a file distilled_<tag>.pt, or that of another code (docs/data.md)",
        group=_SET,
        alias="data_dir",
    )
    hard_labels: bool = option(
        True,
        "of a set with soft labels or learned steps, also evaluate images and classes alone",
        group=_EVAL,
    )
    random: bool | None = option(
        None,
        "also evaluate random real images at the same IPC (default: beside soft labels)",
        group=_EVAL,
    )
    herding: bool = option(
        False,
        "also evaluate real images that keep the class mean of an expert's features",
        group=_EVAL,
    )
    k_center: bool = option(
        False,
        "also evaluate real images that are far from each other in an expert's features",
        group=_EVAL,
    )
    forgetting: bool = option(
        False,
        "also evaluate the real images that an expert most often got right and then wrong",
        group=_EVAL,
    )
    lowest_loss: bool = option(
        False, "also evaluate the real images that an expert has the lowest loss on", group=_EVAL
    )
    equal_bytes: bool = option(
        False,
        "also evaluate as many random real images, of a byte a value, as the set has bytes for",
        group=_EVAL,
    )
    full: bool = option(False, "also evaluate the full training set", group=_EVAL)
    model: list[str] | None = option(
        None,
        f"networks to train, also {elsewhere.FORMS}; ConvNetKIP also regresses on the labels of a "
        "set of KIP or Label Solve (default: the set's own)",
        group=_EVAL,
        check=check_name,
    )
    by_class: bool = option(False, "print the accuracy on each class too", group=_EVAL)
    epoch_full_train: int | None = option(
        None, "epochs on the full training set (default: epoch_eval_train)", group=_EVAL, minimum=1
    )
    lr_real: float = option(
        0.01, "learning rate on real images, which have no learned one", group=_EVAL, above=0
    )
    batch_train: int | None = option(
        None, "batch size (default: the distillation's)", group=_EVAL, minimum=1
    )
    dsa: bool | None = option(
        None, "augment with DSA (default: as the distillation does)", group=_EVAL
    )
    data_path: str | None = option(
        None, "folder of the data set (default: the one of the distillation)", group=_DATA
    )
    other_test: bool = option(
        False, "measure on other test images than those of the distillation", group=_DATA
    )
    buffer_path: str | None = option(
        None,
        "folder of expert trajectories, for herding, k_center, forgetting and lowest_loss "
        "(default: the distillation's)",
        group=_FILES,
    )
    skip_bad_buffers: bool = option(
        False, "go on without buffer files that are damaged", group=_FILES
    )
    seed: int = option(0, "seed of every random stream", group=_RUN, minimum=0)

    @property
    def selections(self) -> list[str]:
        """The rules of utils/measure/selection.py whose flags are given."""
        return [name for name in SELECTIONS if getattr(self, name)]

    @property
    def needs_train(self) -> bool:
        """Whether networks are trained on real images too."""
        return bool(self.selections or self.equal_bytes or self.full)
