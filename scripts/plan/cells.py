"""The cells of the table: the experts of one kind, or one row with its evaluation.

Every flag that a cell's commands have is resolved here as the scripts will do it, so a bad one is
refused before any work, and estimates are of what will be run.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.plan.estimate import Estimate, experts_estimate, row_estimate
from utils.config.resolve import CONFIGS, DEFAULT, FLAG, Resolved, resolve, shortest
from utils.core.errors import UserError
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.spec import side_of
from utils.experts.kind import ExpertKind
from utils.methods.registry import METHODS, check_own_flags
from utils.options import DistillOptions, EvalOptions
from utils.plan.experts import ExpertsToMake
from utils.run.directory import RunDir

RUN_NAME = "run_all"  # of the run directories, unless another is given
TABLE = ("CIFAR10", "CIFAR100", "Tiny", "ImageNet")
ROW_FILE = re.compile(r"ipc(\d+)(?:_(\w+))?")  # ipc10 is ATT's row, ipc10_ftd a rival's
# A run is evaluated every 1 % of its steps, but not more often than eval_it says: a million steps,
# evaluated and saved every hundred, would take days and 80 GB for that alone.
EVALUATIONS = 100

# The table in miniature: its rows on digits, with a side of the images for each data set, so that
# rows share experts as they do in the table.
SMOKE_RES = {"CIFAR10": 8, "CIFAR100": 9, "Tiny": 10, "ImageNet": 11}
SMOKE_IPC = 2  # at most
SMOKE_EXPERTS = "--num_experts 2 --train_epochs 2"
SMOKE_EVALUATION = "--num_eval 1 --epoch_eval_train 1"
SMOKE_DISTILLATION = (
    f"--dataset digits --model ConvNetD1 {SMOKE_EVALUATION} --Iteration 2 --eval_it 2"
)
SMOKE_IMAGES = "--lr_img 1"
SMOKE_MATCHING = "--syn_steps 2 --expert_epochs 1 --lr_lr 1e-7 --lr_teacher 0.01"
SMOKE_STARTS = "--max_start_epoch 1"
# Of methods whose rows are too large for such images.
SMOKE_OWN = {
    "dd": "--distill_steps 1",
    "label_solve": "--kernel fc",
    "cafe": "--max_loop 2",
    "cafe_dsa": "--max_loop 2",
}
SMOKE_STARTS_DATM = "--start_epochs 0 1 --current_max_start_epoch 1 --expansion_end_epoch 1"


@dataclass(frozen=True)
class Settings:
    """What all cells have in common; `distill_flags` are further flags of distill_att.py."""

    data_path: str
    buffer_path: str
    save_path: str
    run_name: str
    distill_flags: tuple[str, ...] = ()
    smoke: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table, ATT's or with a `method` a rival's; ImageNet's come once a subset."""

    dataset: str
    subset: str | None
    ipc: int
    method: str | None = None

    @property
    def name(self) -> str:
        parts = (self.dataset, self.subset, f"ipc{self.ipc}", self.method)
        return "/".join(part for part in parts if part)

    @property
    def yaml(self) -> Path:
        stem = f"ipc{self.ipc}" + (f"_{self.method}" if self.method else "")
        return shortest(CONFIGS / self.dataset / f"{stem}.yaml")

    def resolve(self, flags: Sequence[str]) -> Resolved[DistillOptions]:
        """What distill_att.py takes these flags for, with the row's YAML file."""
        return resolve(DistillOptions, flags, description="", find_yaml=lambda given: self.yaml)


@dataclass(frozen=True)
class Cell:
    """An entry of the queue: commands that follow one another, each begun by its script's name.

    `options` is what they resolve to. They write in the folders `outputs` and read what is in
    `inputs`. `needs` names the cell of the experts, if it needs any.
    """

    name: str
    text: str
    commands: tuple[str, ...]
    estimate: Estimate
    options: tuple[Any, ...] = ()
    outputs: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()
    needs: str | None = None
    is_experts: bool = False
    stage: int = 0  # of experts: begun when those of earlier stages have had their turn


Cells = tuple[list[Cell], list[Cell]]  # of experts, of rows


def choose(settings: Settings, only: Sequence[str], *, rivals: bool = False) -> Cells:
    """The cells to run: ATT's, with `rivals` all, or those that the selectors `only` name, rows
    with their experts. What a selector names is ATT's where ATT has such a cell, else a rival's.
    """
    cells = make_cells(settings, rivals=rivals)
    if not only:
        return cells
    named = {selector: _matching(cells, selector) for selector in only}
    if not all(named.values()):
        everything = make_cells(settings, rivals=True)
        for selector in only:
            named[selector] = named[selector] or _matching(everything, selector)
            if not named[selector]:
                raise UserError(_no_cell(selector, cells))
        cells = everything
    experts, rows = cells
    chosen = set().union(*named.values())
    rows = [row for row in rows if row.name in chosen]
    chosen |= {row.needs for row in rows}
    return [cell for cell in experts if cell.name in chosen], rows


def _matching(cells: Cells, selector: str) -> set[str | None]:
    """The names that have all parts of `selector`: CIFAR10, ipc1, ImageNet/imagenette, FTD."""
    parts = {part for part in selector.lower().split("/") if part}
    names = [cell.name for part in cells for cell in part]
    return {name for name in names if parts and parts <= set(name.lower().split("/"))}


def _no_cell(selector: str, cells: Cells) -> str:
    experts, rows = cells
    methods = sorted({row.method.upper() for row in table_rows(rivals=True) if row.method})
    return (
        f"--only {selector!r} is no cell; choices: "
        f"{', '.join(cell.name for cell in (*rows, *experts))}, "
        "or parts of these names such as CIFAR10, ipc1, experts; rivals by their names: "
        f"{', '.join(methods)}"
    )


def make_cells(settings: Settings, *, rivals: bool = False) -> Cells:
    """The cells of experts, one for each kind that some row needs, and the cells of the rows, in
    the order of `table_rows`.
    """
    rows = [row_cell(row, settings) for row in table_rows(one_subset=settings.smoke, rivals=rivals)]
    return experts_cells(rows, settings), rows


def experts_cells(rows: Sequence[Cell], settings: Settings) -> list[Cell]:
    """The cells of the experts that these rows need, one for each kind."""
    epochs: dict[ExpertKind, int] = {}
    for options in (cell.options[0] for cell in rows if cell.needs):
        kind = ExpertKind.of(options)
        epochs[kind] = max(options.last_epoch, epochs.get(kind, 0))
    return [experts_cell(kind, epochs, settings) for kind in epochs]


def table_rows(*, one_subset: bool = False, rivals: bool = False) -> list[Row]:
    """A row for every configs/<dataset>/ipc<k>.yaml of the table and, with `rivals`, for every
    ipc<k>_<method>.yaml.
    """
    rows = []
    for dataset in TABLE:
        found = (ROW_FILE.fullmatch(path.stem) for path in (CONFIGS / dataset).glob("*.yaml"))
        files = sorted((int(name[1]), name[2] or "") for name in found if name)
        subsets: list[str | None] = list(IMAGENET_SUBSETS) if dataset == "ImageNet" else [None]
        for subset in subsets[:1] if one_subset else subsets:
            rows += [
                Row(dataset, subset, ipc, method or None)
                for ipc, method in files
                if rivals or not method
            ]
    return rows


def row_options(row: Row) -> DistillOptions:
    """The published settings of a row, as distill_att.py takes them."""
    flags = ["--dataset", row.dataset, *(["--subset", row.subset] if row.subset else [])]
    return row.resolve(flags).options


def needs_experts(options: DistillOptions) -> bool:
    """Whether a distillation with `options` reads expert trajectories."""
    return METHODS[options.method].needs_experts


def row_cell(row: Row, settings: Settings) -> Cell:
    """Of distilling the row and evaluating the result."""
    flags, options = distillation(row, settings)
    length = f"N_S {options.syn_steps}, " if needs_experts(options) else ""
    # Runs of another name are cells of their own, with logs of their own.
    name = row.name if settings.run_name == RUN_NAME else f"{row.name}/{settings.run_name}"
    text = f"{options.Iteration:,} steps, {length}eval_it {options.eval_it}"
    return run_cell(name, text, flags, options, evaluation_flags(options, settings), settings)


def run_cell(
    name: str,
    text: str,
    flags: Sequence[str],
    options: DistillOptions,
    evaluations: Sequence[Sequence[str]],
    settings: Settings,
) -> Cell:
    """Of a distillation, whose `flags` amount to `options`, and of calls of eval.py behind it.

    Without such a call the least evaluation is counted.
    """
    measured = [resolve(EvalOptions, each, description="").options for each in evaluations]
    counted = measured[0] if measured else EvalOptions(num_eval=1, epoch_eval_train=1)
    calls = [["distill_att.py", *flags], *(["eval.py", *each] for each in evaluations)]
    kind = ExpertKind.of(options) if needs_experts(options) else None
    experts = [kind.folder(settings.buffer_path)] if kind else []
    return Cell(
        name,
        text,
        tuple(map(shlex.join, calls)),
        row_estimate(options, counted, res=side_of(options.dataset, options.res)),
        options=(options, *measured),
        outputs=(run_of(options).path,),
        inputs=(Path(settings.data_path), *experts),
        needs=experts_name(kind) if kind else None,
    )


def run_of(options: DistillOptions) -> RunDir:
    return RunDir.of(options, options.run_name or "")


def distillation(row: Row, settings: Settings) -> tuple[list[str], DistillOptions]:
    """The flags of the row's distill_att.py command and the options that they amount to."""
    flags = smoke_flags(row) if settings.smoke else table_flags(row)
    flags += ["--run_name", run_name(row, settings)]
    flags += ["--save_path", settings.save_path, "--buffer_path", settings.buffer_path]
    flags += ["--data_path", settings.data_path, *settings.distill_flags]
    found = row.resolve(flags)
    check_own_flags(found.options.method, found.sources)
    sparse = found.options.Iteration // EVALUATIONS
    if found.sources["eval_it"] == DEFAULT and sparse > found.options.eval_it:
        flags += ["--eval_it", str(sparse)]
        found.set("eval_it", sparse, FLAG)
    return flags, found.options


def table_flags(row: Row) -> list[str]:
    """Those that name the row."""
    flags = ["--dataset", row.dataset, "--ipc", str(row.ipc)]
    flags += ["--subset", row.subset] if row.subset else []
    return [*flags, "--config", str(row.yaml)] if row.method else flags


def smoke_flags(row: Row) -> list[str]:
    """Those of the row in miniature."""
    options = row_options(row)
    flags = f"--res {SMOKE_RES[row.dataset]} --ipc {min(row.ipc, SMOKE_IPC)} {SMOKE_DISTILLATION}"
    if METHODS[options.method].learns_images:
        flags += f" {SMOKE_IMAGES}"
    if needs_experts(options):
        starts = SMOKE_STARTS if options.start_epochs is None else SMOKE_STARTS_DATM
        flags += f" {SMOKE_MATCHING} {starts}"
    elif own := SMOKE_OWN.get(options.method):
        flags += f" {own}"
    return ["--config", str(row.yaml), *flags.split()]


def run_name(row: Row, settings: Settings) -> str:
    """That of the run directory, which rows in miniature and rivals share with others."""
    more = row.name.replace("/", "_") if settings.smoke else row.method
    return f"{settings.run_name}_{more}" if more else settings.run_name


def evaluation_flags(options: DistillOptions, settings: Settings) -> list[list[str]]:
    """Those of each eval.py command, on the row's own network and the others of the paper's
    Table 1.
    """
    run, tag = run_of(options), "best" if options.eval_it > 0 else "last"
    flags = ["--data_path", settings.data_path]
    own, *others = CROSS_ARCHITECTURE
    if settings.smoke:
        flags += SMOKE_EVALUATION.split()
    elif canonical_name(options.model) == canonical_name(own):
        flags += ["--eval_mode", "M"]
    else:
        flags += ["--model", options.model, *others]
    raw = ["--distilled", str(run.distilled(tag)), *flags, "--random"]
    ema = ["--distilled", str(run.distilled(f"ema_{tag}")), *flags]
    # The moving average of two steps is not worth one more process for each row.
    return [raw, ema] if "ema" in METHODS[options.method].sets and not settings.smoke else [raw]


def experts_cell(kind: ExpertKind, epochs: Mapping[ExpertKind, int], settings: Settings) -> Cell:
    """Of experts of `kind`; each kind of a plan is at least as long as `epochs` says.

    Experts trained easy-first need some of the ordinary ones. Another cell may train these, too, so
    theirs come later, and find them there.
    """

    def to_make(kind: ExpertKind, flags: str) -> ExpertsToMake:
        least = epochs.get(kind, 1)
        return ExpertsToMake.of(kind, settings.buffer_path, epochs=least, flags=flags)

    calls = [experts := to_make(kind, smoke_experts(kind) if settings.smoke else "")]
    text = f"{len(experts)} experts of {experts.epochs} epochs"
    if kind.easy_first:
        number = experts.options.el2n_experts
        few = SMOKE_EXPERTS if settings.smoke else f"--num_experts {number}"
        calls.insert(0, to_make(kind.ordinary, few))
        text += f", and {number} that rank the images"
    estimates = [experts_estimate(call.options, res=kind.res) for call in calls]
    return Cell(
        experts_name(kind),
        text,
        tuple(call.command.removeprefix("python ") for call in calls),
        Estimate.of_all(estimates),
        options=tuple(call.options for call in calls),
        outputs=(experts.folder,),
        inputs=(Path(settings.data_path),),
        is_experts=True,
        stage=int(kind.easy_first),
    )


def smoke_experts(kind: ExpertKind) -> str:
    """The flags of experts in miniature."""
    return SMOKE_EXPERTS + (" --el2n_experts 2" if kind.easy_first else "")


def experts_name(kind: ExpertKind) -> str:
    """That of the folder which the rows share."""
    return f"experts/{kind.folder('.')}"
