"""Train experts on the full training set and keep their parameter trajectories.

    python buffer.py --dataset CIFAR10

The same call again continues, within an expert too. Expert i depends on --seed and i alone. Under
torchrun the experts are divided over the processes; --first_expert divides them over machines.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.compute.cohort import Recipe
from utils.compute.device import compute_dtype, default_device, storage_dtype, use_precision
from utils.compute.execution import Execution
from utils.config.resolve import Resolved, fixed_values, packaged_yaml, resolve
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.progress import progress_bar, time_left
from utils.core.script import run_script
from utils.data.augment import active_groups
from utils.data.dataset import ImageDataset, find_dataset, read_dataset
from utils.data.source import Source
from utils.experts.files import (
    Expert,
    fill_files,
    keep_expert,
    lock_and_list_missing,
    missing_experts,
)
from utils.experts.kind import ExpertKind
from utils.experts.unfinished import ExpertTraining, Schedule
from utils.options import BufferOptions
from utils.plan.choose import TrainingPlan, plan_training
from utils.plan.machine import Machine
from utils.plan.need import experts_demand, experts_time
from utils.plan.room import check_room
from utils.plan.sizes import DataSize

EPOCHS_TO_JUDGE = 5  # epochs of a call before it says how long the rest takes


def main(argv: Sequence[str]) -> int:
    with ranks.process_group():
        run(parse(argv))
    return 0


def parse(argv: Sequence[str]) -> Resolved[BufferOptions]:
    return resolve(BufferOptions, argv, description=__doc__ or "", find_yaml=find_yaml)


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    return packaged_yaml(given.get("dataset", BufferOptions.dataset), "buffer")


def run(resolved: Resolved[BufferOptions]) -> Path:
    """Train the experts that are missing; returns the folder of all of them."""
    check_flat(resolved)
    check_numbers(resolved.options)
    device = default_device()
    precision = use_precision(resolved.options.precision, device)
    resolved.set("precision", precision, resolved.sources["precision"])
    source = find_images(resolved)
    options = resolved.options
    kind = ExpertKind.of(options)
    folder = kind.folder(options.buffer_path)
    check_writable(folder)
    numbers = range(options.first_expert, options.num_experts)
    in_files = {"experts_per_file": options.save_interval}
    missing = missing_experts(folder, numbers, **in_files) if ranks.is_main() else []
    missing = ranks.from_main(missing)
    print(f"buffer.py -> {folder}\n{resolved.table(whole=options.dry_run)}")
    print(f"{len(numbers) - len(missing)} of {len(numbers)} experts are in {folder}")
    plan = plan_training(
        DataSize.of(source).experts_training(options),
        Machine.here(device),
        networks=options.num_experts,
        missing=len(missing),
        compile=options.compile,
        at_once=options.experts_at_once,
    )
    if missing:
        say_what_it_takes(options, source, plan, folder, missing, device)
    ranks.barrier()  # nothing is written before everyone has looked
    if options.dry_run:
        return folder
    with lock_and_list_missing(folder, fixed_values(options), numbers, **in_files) as missing:
        if missing:
            data = read_dataset(source, zca=options.zca)
            data = data.to(device, storage_dtype(precision))
            recipe = make_recipe(options, source, plan, device)
            train_missing(options, recipe, data, folder, numbers, missing, plan.at_once)
            print(f"{len(numbers)} experts of {options.train_epochs} epochs are in {folder}")
    print(f"next: {kind.command(options.buffer_path, 'distill_att.py')} --ipc 1")
    return folder


def check_flat(resolved: Resolved[BufferOptions]) -> None:
    """UserError where a flag of flat steps is given by hand without them."""
    for name in ("rho", "alpha"):
        if resolved.given_by_hand(name) and not resolved.options.flat:
            raise UserError(
                f"--{name} is for sharpness-aware steps: pass --flat too, or leave it out"
            )


def check_numbers(options: BufferOptions) -> None:
    """UserError where there are no experts to train, or not one for each process."""
    count = options.num_experts - options.first_expert
    if count <= 0 or options.first_expert % options.save_interval:
        raise UserError(
            f"--first_expert {options.first_expert} must be below --num_experts "
            f"{options.num_experts} and begin a file, so be a multiple of --save_interval "
            f"{options.save_interval}"
        )
    if ranks.world() > count:
        raise UserError(f"{ranks.world()} processes are more than the {count} experts: start fewer")


def find_images(resolved: Resolved[BufferOptions]) -> Source:
    """Find the data set and record its image size in `resolved`."""
    options = resolved.options
    source = find_dataset(
        options.dataset,
        data_path=options.data_path,
        subset=options.subset,
        res=options.res,
        zca=options.zca,
        val_fraction=options.val_fraction,
    )
    resolved.set("res", source.image_size, resolved.sources["res"])
    return source


def make_recipe(
    options: BufferOptions, source: Source, plan: TrainingPlan, device: torch.device
) -> Recipe:
    return Recipe(
        options.model,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
        momentum=options.mom,
        weight_decay=options.l2,
        sharpness=options.sharpness,
        execution=Execution.on(device, compiled=plan.compiled, cuda_graphs=options.cuda_graphs),
        dtype=compute_dtype(options.precision),
    )


def say_what_it_takes(
    options: BufferOptions,
    source: Source,
    plan: TrainingPlan,
    folder: Path,
    missing: Sequence[int],
    device: torch.device,
) -> None:
    """Print time, memory and disk, estimated; UserError where there is too little room."""
    machine, size = Machine.here(device), DataSize.of(source)
    print(f"estimated: {experts_time(options, size, plan, machine, missing=len(missing))}")
    demand = experts_demand(options, source, plan, machine, folder=folder, missing=missing)
    check_room(demand, machine, force=options.force)


def train_missing(
    options: BufferOptions,
    recipe: Recipe,
    data: ImageDataset,
    folder: Path,
    numbers: range,
    missing: list[int],
    at_once: int,
) -> None:
    """Train the experts `missing`, `at_once` together; write each file when its last is there."""
    rounds = ranks.rounds_of_this_rank(missing, at_once)
    seconds: list[float] = []
    with (
        stopping.deferred(),
        progress_bar(total=len(rounds) * options.train_epochs, unit="epoch") as progress,
    ):
        for own in rounds:
            trained = train_together(options, recipe, data, folder, own, progress, seconds)
            experts = ranks.gather_on_main(trained)
            for number, expert in experts.items():
                keep_expert(folder, number, expert)
            if experts:
                fill_files(folder, numbers, experts_per_file=options.save_interval)


def train_together(
    options: BufferOptions,
    recipe: Recipe,
    data: ImageDataset,
    folder: Path,
    numbers: list[int],
    progress: tqdm,
    seconds: list[float],
) -> dict[int, Expert]:
    """Train the experts `numbers` to their end; `seconds` are those of the epochs of this call."""
    if not numbers:
        return {}
    schedule = Schedule(
        epochs=options.train_epochs,
        lr=options.lr_teacher,
        decay=options.decay,
        batch_size=options.batch_train,
        dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
    )
    training = ExpertTraining(recipe, schedule, numbers, data, seed=options.seed, folder=folder)
    progress.update(training.epochs)
    while not training.is_finished:
        began = time.monotonic()
        on_train, on_test = training.epoch()
        progress.set_description(f"expert {training}", refresh=False)
        progress.set_postfix_str(f"train {on_train:.1%} test {on_test:.1%}", refresh=False)
        progress.update()
        seconds.append(time.monotonic() - began)
        if len(seconds) == EPOCHS_TO_JUDGE and ranks.is_main():
            left = int(progress.total - progress.n)
            progress.write(time_left(seconds, left, unit="epoch"), file=sys.stdout)
    return training.trajectories


if __name__ == "__main__":
    sys.exit(run_script(main))
