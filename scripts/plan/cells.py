"""The cells of the table: the experts of one kind, or one row with its evaluation.

Every flag that a cell's commands have is resolved here as the scripts will do it, so a bad one is
refused before any work, and estimates are of what will be run.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.plan.estimate import Estimate, experts_estimate, row_estimate
from utils.config.resolve import CONFIGS, DEFAULT, Resolved, packaged_yaml, resolve
from utils.core.errors import UserError
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.spec import side_of
from utils.experts.kind import ExpertKind
from utils.methods.registry import METHODS, check_own_flags
from utils.options import BufferOptions, DistillOptions, EvalOptions
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
    f"--dataset digits --model ConvNetD1 {SMOKE_EVALUATION} --Iteration 2 --eval_it 2 --lr_img 1"
)
SMOKE_MATCHING = "--syn_steps 2 --expert_epochs 1 --lr_lr 1e-7 --lr_teacher 0.01"
SMOKE_STARTS = "--max_start_epoch 1"
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
        return Path(os.path.relpath(CONFIGS / self.dataset / f"{stem}.yaml"))


@dataclass(frozen=True)
class Cell:
    """An entry of the queue: commands that follow one another, each begun by its script's name.

    `options` is what they resolve to. They write in the folders `outputs`, a row's run directory
    first, and read what is in `inputs`. `needs` names the cell of the experts, if it needs any.
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

    @property
    def run_dir(self) -> Path | None:
        return None if self.is_experts or not self.outputs else self.outputs[0]

    def matches(self, selector: str) -> bool:
        """Whether the name has all parts of `selector`: CIFAR10, ipc1, ImageNet/imagenette, FTD."""
        parts = {part for part in selector.lower().split("/") if part}
        return bool(parts) and parts <= set(self.name.lower().split("/"))


Cells = tuple[list[Cell], list[Cell]]  # of experts, of rows


def make_cells(settings: Settings, *, rivals: bool = False) -> Cells:
    """The cells of experts, one for each kind that some row needs, and the cells of the rows, in
    the order of `table_rows`.
    """
    rows: list[Cell] = []
    epochs: dict[ExpertKind, int] = {}
    for row in table_rows(one_subset=settings.smoke, rivals=rivals):
        command, options = distillation(row, settings)
        kind = ExpertKind.of(options) if needs_experts(options) else None
        if kind:
            last_epoch = options.starts.end + options.expert_epochs
            epochs[kind] = max(last_epoch, epochs.get(kind, 0))
        rows.append(row_cell(row, command, options, kind, settings))
    experts = [experts_cell(kind, number, settings) for kind, number in epochs.items()]
    return experts, rows


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
    return resolve(DistillOptions, flags, description="", find_yaml=lambda given: row.yaml).options


def needs_experts(options: DistillOptions) -> bool:
    """Whether a distillation with `options` reads expert trajectories."""
    return METHODS[options.method].needs_experts


def distillation(row: Row, settings: Settings) -> tuple[str, DistillOptions]:
    """The row's distill_att.py command and the options that it amounts to."""
    flags = (smoke_flags if settings.smoke else table_flags)(row, settings.run_name)
    flags += ["--save_path", settings.save_path, "--buffer_path", settings.buffer_path]
    flags += ["--data_path", settings.data_path, *settings.distill_flags]

    def resolved(flags: list[str]) -> Resolved[DistillOptions]:
        return resolve(DistillOptions, flags, description="", find_yaml=lambda given: row.yaml)

    found = resolved(flags)
    check_own_flags(found.options.method, found.sources)
    sparse = found.options.Iteration // EVALUATIONS
    if found.sources["eval_it"] == DEFAULT and sparse > found.options.eval_it:
        flags += ["--eval_it", str(sparse)]
    return shlex.join(["distill_att.py", *flags]), resolved(flags).options


def table_flags(row: Row, run_name: str) -> list[str]:
    flags = ["--dataset", row.dataset, "--ipc", str(row.ipc)]
    flags += ["--subset", row.subset] if row.subset else []
    if row.method:
        return [*flags, "--config", str(row.yaml), "--run_name", f"{run_name}_{row.method}"]
    return [*flags, "--run_name", run_name]


def smoke_flags(row: Row, run_name: str) -> list[str]:
    """Those of the row in miniature."""
    options = row_options(row)
    flags = f"--res {SMOKE_RES[row.dataset]} --ipc {min(row.ipc, SMOKE_IPC)} {SMOKE_DISTILLATION}"
    if needs_experts(options):
        starts = SMOKE_STARTS if options.start_epochs is None else SMOKE_STARTS_DATM
        flags += f" {SMOKE_MATCHING} {starts}"
    name = f"{run_name}_{row.name.replace('/', '_')}"
    return ["--config", str(row.yaml), *flags.split(), "--run_name", name]


def experts_cell(kind: ExpertKind, epochs: int, settings: Settings) -> Cell:
    """Of experts that are at least `epochs` epochs long."""
    command = kind.command(settings.buffer_path).removeprefix("python ")
    if settings.smoke:
        command += f" {SMOKE_EXPERTS}"

    def resolved(command: str) -> BufferOptions:
        return resolve(
            BufferOptions,
            shlex.split(command)[1:],
            description="",
            find_yaml=lambda given: packaged_yaml(kind.dataset, "buffer"),
        ).options

    if resolved(command).train_epochs < epochs:
        command += f" --train_epochs {epochs}"
    options = resolved(command)
    return Cell(
        experts_name(kind),
        f"{options.num_experts} experts of {options.train_epochs} epochs",
        (command,),
        experts_estimate(options, res=kind.res),
        options=(options,),
        outputs=(kind.folder(settings.buffer_path),),
        inputs=(Path(settings.data_path),),
        is_experts=True,
    )


def experts_name(kind: ExpertKind) -> str:
    """That of the folder which the rows share."""
    return f"experts/{kind.folder('.')}"


def row_cell(
    row: Row,
    command: str,
    options: DistillOptions,
    kind: ExpertKind | None,
    settings: Settings,
) -> Cell:
    """Of a row that needs experts of `kind`, or none."""
    run = RunDir.of(options, options.run_name or "")
    tag = "best" if options.eval_it > 0 else "last"
    flags = ["--data_path", settings.data_path]
    flags += SMOKE_EVALUATION.split() if settings.smoke else evaluation_flags(options.model)
    raw = ["--distilled", str(run.distilled(tag)), *flags, "--random"]
    ema = ["--distilled", str(run.distilled(f"ema_{tag}")), *flags]
    # The moving average of two steps is not worth one more process for each row.
    evaluations = [raw] if settings.smoke else [raw, ema]
    measured = [resolve(EvalOptions, each, description="").options for each in evaluations]
    length = f"N_S {options.syn_steps}, " if needs_experts(options) else ""
    # Runs of another name are cells of their own, with logs of their own.
    name = row.name if settings.run_name == RUN_NAME else f"{row.name}/{settings.run_name}"
    return Cell(
        name,
        f"{options.Iteration:,} steps, {length}eval_it {options.eval_it}",
        (command, *(shlex.join(["eval.py", *each]) for each in evaluations)),
        row_estimate(options, measured[0], res=side_of(options.dataset, options.res)),
        options=(options, *measured),
        outputs=(run.path,),
        inputs=(
            Path(settings.data_path),
            *([kind.folder(settings.buffer_path)] if kind else []),
        ),
        needs=experts_name(kind) if kind else None,
    )


def evaluation_flags(model: str) -> list[str]:
    """The row's own network and the others of the paper's Table 1."""
    own, *others = CROSS_ARCHITECTURE
    if canonical_name(model) == canonical_name(own):
        return ["--eval_mode", "M"]
    return ["--model", model, *others]


def choose(settings: Settings, only: Sequence[str], *, rivals: bool = False) -> Cells:
    """The cells to run: ATT's, with `rivals` all, or those that the selectors `only` name, rows
    with their experts. What a selector names is ATT's where ATT has such a cell, else a rival's.
    """
    cells = make_cells(settings, rivals=rivals)
    foreign = [selector for selector in only if not _any_matches(cells, selector)]
    if not foreign:
        return select(cells, only)
    everything = make_cells(settings, rivals=True)
    for selector in foreign:
        if not _any_matches(everything, selector):
            raise UserError(_no_cell(selector, cells))
    chosen = select(everything, foreign)
    if own := [selector for selector in only if selector not in foreign]:
        chosen = _union(everything, chosen, select(cells, own))
    return chosen


def select(cells: Cells, only: Sequence[str]) -> Cells:
    """The cells that some selector matches, and the experts of such rows; without one, all."""
    if not only:
        return cells
    experts, rows = cells
    chosen = [row for row in rows if any(map(row.matches, only))]
    needed = {row.needs for row in chosen}
    return [e for e in experts if e.name in needed or any(map(e.matches, only))], chosen


def _union(everything: Cells, *parts: Cells) -> Cells:
    """The cells of all parts, as they are in `everything`."""
    names = {cell.name for part in parts for cell in _all(part)}
    experts, rows = ([cell for cell in cells if cell.name in names] for cells in everything)
    return experts, rows


def _all(cells: Cells) -> list[Cell]:
    experts, rows = cells
    return [*rows, *experts]


def _any_matches(cells: Cells, selector: str) -> bool:
    return any(cell.matches(selector) for cell in _all(cells))


def _no_cell(selector: str, cells: Cells) -> str:
    methods = sorted({row.method.upper() for row in table_rows(rivals=True) if row.method})
    return (
        f"--only {selector!r} is no cell; choices: {', '.join(cell.name for cell in _all(cells))}, "
        "or parts of these names such as CIFAR10, ipc1, experts; rivals by their names: "
        f"{', '.join(methods)}"
    )
