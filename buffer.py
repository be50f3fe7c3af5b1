"""Train experts on the full training set and keep their parameter trajectories.

    python buffer.py --dataset CIFAR10

The same call again continues, within an expert too. Expert i depends on --seed and i alone. Under
torchrun the experts are divided over the processes; --first_expert divides them over machines.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from networks import elsewhere
from utils.compute.cohort import Recipe
from utils.compute.contract import check_batches, check_known, check_repeatable
from utils.compute.device import compute_dtype, default_device, storage_dtype, use_device
from utils.compute.execution import Execution
from utils.config.resolve import Resolved, fixed_values, packaged_yaml, resolve
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.progress import progress_bar, time_left
from utils.core.script import run_script
from utils.data.augment import active_groups
from utils.data.dataset import read_dataset
from utils.data.identity import DataIdentity, identity_of
from utils.data.source import Source
from utils.experts.easy_first import Judges, easy_first_flags, images_by_epoch
from utils.experts.files import (
    Expert,
    check_images,
    fill_files,
    holds_experts,
    keep_expert,
    lock_and_list_missing,
    missing_experts,
)
from utils.experts.kind import ExpertKind
from utils.experts.unfinished import ExpertTraining, Schedule
from utils.options import BufferOptions
from utils.plan.experts import ExpertsCall, ExpertsToMake
from utils.plan.machine import Machine
from utils.plan.room import check_room
from utils.plan.sizes import DataSize, settle_images

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
    check_flags(resolved)
    use_device(resolved.options.device)
    check_known([resolved.options.model])
    source = settle_images(resolved)
    options, size = resolved.options, DataSize.of(source)
    check_repeatable(options.model, **size.shape)
    check_epochs(options, source)
    kind = ExpertKind.of(options)
    folder = kind.folder(options.buffer_path)
    check_writable(folder)
    images = identity_of(source, options.data_path)
    if holds_experts(folder):
        check_images(folder, images)
    numbers = range(options.first_expert, options.num_experts)
    in_files = {"experts_per_file": options.save_interval}
    missing = missing_experts(folder, numbers, **in_files) if ranks.is_main() else []
    missing = ranks.from_main(missing)
    judges = open_judges(options, source, images) if missing and options.easy_first else None
    print(f"buffer.py -> {folder}\n{resolved.table(whole=options.dry_run)}")
    print(source.describe())
    if options.by_difficulty:
        print(f"--easy_first: {options.by_difficulty}")
    if judges:
        print(f"difficulty: mean EL2N of {judges}")
    print(f"{len(numbers) - len(missing)} of {len(numbers)} experts are in {folder}")
    machine = Machine.here(default_device())
    call = ExpertsCall.planned(options, size, missing, machine)
    if missing:
        # Compiling may have been tried since the call was planned, which takes memory.
        call = replace(call, machine=Machine.here(default_device()))
        print(f"estimated: {call.time}")
        check_room(call.demand(source, folder), call.machine, force=options.force)
    ranks.barrier()  # nothing is written before everyone has looked
    if options.dry_run:
        return folder
    settings = recorded_settings(options)
    if elsewhere.is_elsewhere(options.model):  # its code may change
        settings["parameters"] = call.plan.training.cost.parameters
    with lock_and_list_missing(folder, settings, numbers, **in_files, images=images) as missing:
        if missing:
            train_missing(call, trainer(call, source, folder, judges), folder, missing)
            print(f"{len(numbers)} experts of {options.train_epochs} epochs are in {folder}")
    print(f"next: {kind.command(options.buffer_path, 'distill_att.py')} --ipc 1")
    return folder


def check_flags(resolved: Resolved[BufferOptions]) -> None:
    """UserError where flags contradict each other, or leave a process without an expert.

    A flag of FTD's steps asks for them: its own code has no other.
    """
    for name in ("rho", "alpha"):
        if resolved.given_by_hand(name) and not resolved.options.flat:
            if resolved.given_by_hand("flat"):
                raise UserError(
                    f"--{name} is for sharpness-aware steps: leave it out, or --no_flat"
                )
            print(f"--{name}: taken with --flat, for sharpness-aware steps (FTD)")
            resolved.set("flat", True, f"--{name}")
    options = resolved.options
    for name in easy_first_flags():
        if resolved.given_by_hand(name) and not options.easy_first:
            raise UserError(f"--{name} is for --easy_first: add that, or leave --{name} out")
    if plan := options.by_difficulty:
        taken = {"all_from": plan.all_from, "drop_after": [after for after, _ in plan.drops]}
        for name, value in taken.items():
            if getattr(options, name) is None:
                resolved.set(name, value, f"PAD's for {options.train_epochs} epochs")
    count = options.num_experts - options.first_expert
    if count <= 0 or options.first_expert % options.save_interval:
        raise UserError(
            f"--first_expert {options.first_expert} must be below --num_experts "
            f"{options.num_experts} and begin a file, so be a multiple of --save_interval "
            f"{options.save_interval}"
        )
    if ranks.world() > count:
        raise UserError(f"{ranks.world()} processes are more than the {count} experts: start fewer")


def check_epochs(options: BufferOptions, source: Source) -> None:
    """UserError where an epoch that goes without some images has a batch that cannot be trained."""
    if plan := options.by_difficulty:
        sizes = Counter(map(int, source.labels["train"])).values()
        shape = DataSize.of(source).shape
        for images in set(plan.counts(options.train_epochs, [*sizes])):
            check_batches(options.model, images, options.batch_train, **shape)


def open_judges(options: BufferOptions, source: Source, images: DataIdentity) -> Judges:
    """Open the ordinary experts that rank the images of experts trained easy-first."""
    kind = ExpertKind.of(options).ordinary
    number = options.el2n_experts
    to_make = ExpertsToMake.of(kind, options.buffer_path, epochs=1, flags=f"--num_experts {number}")
    return Judges.open(
        source,
        images,
        kind,
        options.buffer_path,
        number=number,
        epoch=options.el2n_epoch,
        command=to_make.command,
    )


def recorded_settings(options: BufferOptions) -> dict[str, Any]:
    """What experts.json says of experts; earlier versions knew none that are trained easy-first."""
    unknown = () if options.easy_first else ("easy_first", *easy_first_flags())
    return {name: value for name, value in fixed_values(options).items() if name not in unknown}


def trainer(
    call: ExpertsCall, source: Source, folder: Path, judges: Judges | None = None
) -> Callable[[Sequence[int]], ExpertTraining]:
    """Read the images, and rank them where there are `judges`; returns what begins, or continues,
    the training of experts by number.
    """
    options, device = call.options, default_device()
    data = read_dataset(source, zca=options.zca).to(device, storage_dtype(options.precision))
    recipe = Recipe(
        options.model,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
        momentum=options.mom,
        weight_decay=options.l2,
        sharpness=options.sharpness,
        execution=Execution.on(
            device, compiled=call.plan.compiled, cuda_graphs=options.cuda_graphs
        ),
        dtype=compute_dtype(options.precision),
    )
    schedule = Schedule(
        epochs=options.train_epochs,
        lr=options.lr_teacher,
        decay=options.decay,
        batch_size=options.batch_train,
        dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
    )
    seen = None
    if options.by_difficulty:
        assert judges is not None
        train = data.require_train()
        difficulty = judges.difficulty(train, folder)
        seen = images_by_epoch(options.by_difficulty, difficulty, train.labels.cpu())
    return partial(
        ExpertTraining, recipe, schedule, data=data, seed=options.seed, folder=folder, seen=seen
    )


def train_missing(
    call: ExpertsCall,
    begin: Callable[[Sequence[int]], ExpertTraining],
    folder: Path,
    missing: list[int],
) -> None:
    """Train the experts `missing`, some together; write each file when its last is there."""
    options = call.options
    numbers = range(options.first_expert, options.num_experts)
    rounds = ranks.rounds_of_this_rank(missing, call.plan.at_once)
    seconds: list[float] = []
    with (
        stopping.deferred(),
        progress_bar(total=len(rounds) * options.train_epochs, unit="epoch") as progress,
    ):
        for own in rounds:
            trained = train_to_end(begin(own), progress, seconds) if own else {}
            with stopping.abandonable():  # each process has kept its own
                experts = ranks.gather_on_main(trained)
            for number, expert in experts.items():
                keep_expert(folder, number, expert)
            if experts:
                with stopping.immediate():
                    fill_files(folder, numbers, experts_per_file=options.save_interval)


def train_to_end(
    training: ExpertTraining, progress: tqdm, seconds: list[float]
) -> dict[int, Expert]:
    """Train to the last epoch; `seconds` are those of all epochs of this call."""
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
