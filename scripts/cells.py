"""The cells of the table: the experts of one kind, or one row with its evaluation.

Every flag that a cell's commands have is resolved here as the scripts will do it, so a bad one is
refused before any work, and estimates are of what will be run.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.estimate import Estimate, experts_estimate, row_estimate
from utils.config import CONFIGS, DEFAULT, Resolved, packaged_yaml, resolve
from utils.errors import UserError
from utils.expert_buffer import NATIVE_RES, ExpertKind
from utils.imagenet_subsets import IMAGENET_SUBSETS
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.run_dir import RunDir

RUN_NAME = "run_all"  # of the run directories, unless another is given
TABLE = ("CIFAR10", "CIFAR100", "Tiny", "ImageNet")
# A run is evaluated every 1 % of its steps, but not more often than eval_it says: a million steps,
# evaluated and saved every hundred, would take days and 80 GB for that alone.
EVALUATIONS = 100

# The table in miniature: its rows on digits, with a side of the images for each data set, so that
# rows share experts as they do in the table.
SMOKE_RES = {"CIFAR10": 8, "CIFAR100": 9, "Tiny": 10, "ImageNet": 11}
SMOKE_MODEL, SMOKE_IPC = "ConvNetD1", 2
SMOKE_EXPERTS = "--num_experts 2 --train_epochs 2"
SMOKE_EVALUATION = "--num_eval 1 --epoch_eval_train 1"
SMOKE_DISTILLATION = (
    f"{SMOKE_EVALUATION} --Iteration 2 --eval_it 2 --syn_steps 2 --expert_epochs 1 "
    "--max_start_epoch 1 --lr_img 1 --lr_lr 1e-7 --lr_teacher 0.01"
)


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
    """A row of the table; ImageNet's come once a subset."""

    dataset: str
    subset: str | None
    ipc: int

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.dataset, self.subset, f"ipc{self.ipc}") if part)

    @property
    def yaml(self) -> Path:
        return Path(os.path.relpath(CONFIGS / self.dataset / f"ipc{self.ipc}.yaml"))


@dataclass(frozen=True)
class Cell:
    """An entry of the queue: commands that follow one another, each begun by its script's name."""

    name: str
    text: str
    commands: tuple[str, ...]
    estimate: Estimate
    needs: str | None = None
    run_dir: Path | None = None

    @property
    def is_experts(self) -> bool:
        return self.run_dir is None

    def matches(self, selector: str) -> bool:
        """Whether the name has all parts of `selector`: CIFAR10, ipc1, ImageNet/imagenette."""
        parts = {part for part in selector.split("/") if part}
        return bool(parts) and parts <= set(self.name.split("/"))


def make_cells(settings: Settings) -> tuple[list[Cell], list[Cell]]:
    """The cells of experts, one for each kind that some row needs, and the cells of the rows."""
    rows: list[Cell] = []
    epochs: dict[ExpertKind, int] = {}
    for row in table_rows(one_subset=settings.smoke):
        command, options = distillation(row, settings)
        kind = expert_kind(options)
        last_epoch = options.max_start_epoch + options.expert_epochs
        epochs[kind] = max(last_epoch, epochs.get(kind, 0))
        rows.append(row_cell(row, command, options, kind, settings))
    experts = [experts_cell(kind, number, settings) for kind, number in epochs.items()]
    return experts, rows


def table_rows(*, one_subset: bool) -> list[Row]:
    """A row for every configs/<dataset>/ipc<k>.yaml of the table."""
    rows = []
    for dataset in TABLE:
        ipcs = sorted(int(path.stem[3:]) for path in (CONFIGS / dataset).glob("ipc*.yaml"))
        subsets: list[str | None] = list(IMAGENET_SUBSETS) if dataset == "ImageNet" else [None]
        for subset in subsets[:1] if one_subset else subsets:
            rows += [Row(dataset, subset, ipc) for ipc in ipcs]
    return rows


def distillation(row: Row, settings: Settings) -> tuple[str, DistillOptions]:
    """The row's distill_att.py command and the options that it amounts to."""
    flags = ["--dataset", row.dataset, "--ipc", str(row.ipc)]
    flags += ["--subset", row.subset] if row.subset else []
    run_name = settings.run_name
    if settings.smoke:
        flags = ["--config", str(row.yaml), "--dataset", "digits"]
        flags += ["--res", str(SMOKE_RES[row.dataset]), "--ipc", str(min(row.ipc, SMOKE_IPC))]
        flags += ["--model", SMOKE_MODEL, *SMOKE_DISTILLATION.split()]
        run_name = f"{settings.run_name}_{row.name.replace('/', '_')}"
    flags += ["--run_name", run_name, "--save_path", settings.save_path]
    flags += ["--buffer_path", settings.buffer_path, "--data_path", settings.data_path]
    flags += settings.distill_flags

    def resolved(flags: list[str]) -> Resolved[DistillOptions]:
        return resolve(DistillOptions, flags, description="", find_yaml=lambda given: row.yaml)

    found = resolved(flags)
    sparse = found.options.Iteration // EVALUATIONS
    if found.sources["eval_it"] == DEFAULT and sparse > found.options.eval_it:
        flags += ["--eval_it", str(sparse)]
    return shlex.join(["distill_att.py", *flags]), resolved(flags).options


def expert_kind(options: DistillOptions) -> ExpertKind:
    return ExpertKind(
        options.dataset,
        options.subset,
        options.res or NATIVE_RES[options.dataset],
        options.zca,
        options.model,
        options.data_path,
    )


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
    )


def experts_name(kind: ExpertKind) -> str:
    """That of the folder which the rows share."""
    return f"experts/{kind.folder('.')}"


def row_cell(
    row: Row, command: str, options: DistillOptions, kind: ExpertKind, settings: Settings
) -> Cell:
    run = RunDir.locate(
        options.save_path,
        dataset=options.dataset,
        subset=options.subset,
        model=options.model,
        ipc=options.ipc,
        run_name=options.run_name or "",
    )
    tag = "best" if options.eval_it > 0 else "last"
    flags = ["--distilled", str(run.distilled(tag)), "--data_path", settings.data_path]
    flags += SMOKE_EVALUATION.split() if settings.smoke else ["--eval_mode", "M"]
    flags.append("--random")
    evaluation = resolve(EvalOptions, flags, description="").options
    # Runs of another name are cells of their own, with logs of their own.
    name = row.name if settings.run_name == RUN_NAME else f"{row.name}/{settings.run_name}"
    return Cell(
        name,
        f"{options.Iteration:,} steps, N_S {options.syn_steps}, eval_it {options.eval_it}",
        (command, shlex.join(["eval.py", *flags])),
        row_estimate(options, evaluation, res=kind.res),
        needs=experts_name(kind),
        run_dir=run.path,
    )


def select(
    experts: list[Cell], rows: list[Cell], only: Sequence[str]
) -> tuple[list[Cell], list[Cell]]:
    """The cells that some selector matches, and the experts of such rows; without one, all."""
    if not only:
        return experts, rows
    for selector in only:
        if not any(cell.matches(selector) for cell in [*experts, *rows]):
            names = ", ".join(cell.name for cell in [*rows, *experts])
            raise UserError(
                f"--only {selector!r} is no cell; choices: {names}, or parts of these names such "
                "as CIFAR10, ipc1, experts"
            )
    chosen = [row for row in rows if any(map(row.matches, only))]
    needed = {row.needs for row in chosen}
    return [e for e in experts if e.name in needed or any(map(e.matches, only))], chosen
