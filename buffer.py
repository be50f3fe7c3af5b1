"""Train experts on the full training set and keep their parameter trajectories.

    python buffer.py --dataset CIFAR10

The same call again continues, within an expert too. Expert i depends on --seed and i alone. Under
torchrun the experts are divided over the processes; --first_expert divides them over machines.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.compute.cohort import Recipe, accuracy
from utils.compute.cost import network_cost, training_flop
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
from utils.experts.files import Expert, adding, missing_experts, save_expert
from utils.experts.kind import ExpertKind
from utils.experts.unfinished import ExpertTraining
from utils.options import BufferOptions
from utils.plan.auto import choose_at_once, choose_compile
from utils.plan.estimate import expected_experts_time, experts_demand
from utils.plan.room import check_room

EPOCHS_TO_JUDGE = 5  # epochs of a call before it says how long the rest takes


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    return packaged_yaml(given.get("dataset", BufferOptions.dataset), "buffer")


def main(argv: Sequence[str]) -> int:
    with ranks.process_group():
        return make_experts(argv)


def make_experts(argv: Sequence[str]) -> int:
    resolved = resolve(BufferOptions, argv, description=__doc__ or "", find_yaml=find_yaml)
    options = resolved.options
    device = default_device()
    precision = use_precision(options.precision, device)
    check_flat(resolved)
    found = find_dataset(
        options.dataset,
        data_path=options.data_path,
        subset=options.subset,
        res=options.res,
        zca=options.zca,
        val_fraction=options.val_fraction,
    )
    resolved.set("res", found.image_size, resolved.sources["res"])
    resolved.set("precision", precision, resolved.sources["precision"])
    options = resolved.options
    folder = ExpertKind.of(options).folder(options.buffer_path)
    check_writable(folder)
    numbers, per_file = check_numbers(options), options.save_interval
    missing = ranks.from_main(
        missing_experts(folder, numbers, experts_per_file=per_file) if ranks.is_main() else []
    )
    print(f"buffer.py\n{resolved.table()}")
    print(f"{len(numbers) - len(missing)} of {len(numbers)} experts are in {folder}")
    recipe, at_once = choose_recipe(options, found, device, len(missing))
    say_what_it_takes(options, found, recipe, folder, missing, at_once, device)
    ranks.barrier()  # nothing is written before everyone has looked
    if options.dry_run:
        return 0
    with hold_files(options, folder, numbers) as missing:
        if not missing:
            return 0
        data = read_dataset(found, zca=options.zca).to(device, storage_dtype(precision))
        rounds = ranks.shares(missing, at_once)
        seconds: list[float] = []
        with (
            stopping.deferred(),
            progress_bar(total=len(rounds) * options.train_epochs, unit="epoch") as progress,
        ):
            for own in rounds:
                experts = {}
                if own:
                    experts = train_experts(options, recipe, data, own, folder, progress, seconds)
                for number, expert in sorted(ranks.gather_on_main(experts).items()):
                    save_expert(folder, number, expert, experts_per_file=per_file)
    print(f"{len(numbers)} experts of {options.train_epochs} epochs are in {folder}")
    return 0


def say_what_it_takes(
    options: BufferOptions,
    source: Source,
    recipe: Recipe,
    folder: Path,
    missing: Sequence[int],
    at_once: int,
    device: torch.device,
) -> None:
    """Print time, memory and disk, estimated; UserError where there is too little room."""
    if not missing:
        return
    compiled = recipe.execution.compiled
    print(
        "estimated:",
        expected_experts_time(
            options, source, device, missing=len(missing), at_once=at_once, compiled=compiled
        ),
    )
    demand = experts_demand(
        options,
        source,
        device,
        folder=folder,
        missing=missing,
        at_once=at_once,
        compiled=compiled,
    )
    check_room(demand, device, force=options.force)


def check_flat(resolved: Resolved[BufferOptions]) -> None:
    """UserError where a flag of flat steps is given by hand without them."""
    for name in ("rho", "alpha"):
        if resolved.given_by_hand(name) and not resolved.options.flat:
            raise UserError(
                f"--{name} is for sharpness-aware steps: pass --flat too, or leave it out"
            )


def check_numbers(options: BufferOptions) -> range:
    """The experts that this call trains; UserError where there are none, or not for everyone."""
    numbers = range(options.first_expert, options.num_experts)
    if not numbers or options.first_expert % options.save_interval:
        raise UserError(
            f"--first_expert {options.first_expert} must be below --num_experts "
            f"{options.num_experts} and begin a file, so be a multiple of --save_interval "
            f"{options.save_interval}"
        )
    if ranks.world() > len(numbers):
        raise UserError(
            f"{ranks.world()} processes are more than the {len(numbers)} experts: start fewer"
        )
    return numbers


@contextmanager
def hold_files(options: BufferOptions, folder: Path, numbers: range) -> Iterator[list[int]]:
    """The main process has the experts' files to itself; yields which are missing, to everyone."""
    if not ranks.is_main():
        yield ranks.from_main([])
        return
    with adding(
        folder, fixed_values(options), numbers, experts_per_file=options.save_interval
    ) as missing:
        yield ranks.from_main(missing)


def choose_recipe(
    options: BufferOptions, source: Source, device: torch.device, missing: int
) -> tuple[Recipe, int]:
    """How experts are trained, and how many in step."""
    cost = network_cost(
        options.model,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
    )
    images = len(source.labels["train"])
    epochs = options.num_experts * options.train_epochs / ranks.world()
    flop = epochs * training_flop(cost, images=images, epochs=1, flat=options.flat)
    layers = cost.layers * (1 + options.flat)  # a flat step is two functions to compile
    compiled = choose_compile(options.compile, flop, device, work="training", layers=layers)
    at_once = choose_at_once(
        options.experts_at_once,
        cost,
        device,
        batch=min(options.batch_train, images),
        networks=missing,
    )
    recipe = Recipe(
        options.model,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
        momentum=options.mom,
        weight_decay=options.l2,
        sharpness=options.sharpness,
        execution=Execution.on(device, compiled=compiled),
        dtype=compute_dtype(options.precision),
    )
    return recipe, at_once


def train_experts(
    options: BufferOptions,
    recipe: Recipe,
    data: ImageDataset,
    numbers: list[int],
    folder: Path,
    progress: tqdm,
    seconds: list[float],
) -> dict[int, Expert]:
    """For each of the experts `numbers` its snapshots: before the first epoch and after each.

    What a signal cuts off is kept as of the last epoch, and with several experts in step so often
    that never more than the work of one is lost. `seconds` are those of the epochs so far in this
    call.
    """
    train = data.require_train()
    training = ExpertTraining(
        recipe,
        numbers,
        seed=options.seed,
        folder=folder,
        device=train.images.device,
        dtype=train.images.dtype,
    )
    progress.update(training.epoch)
    for epoch in range(training.epoch, options.train_epochs):
        decayed = options.decay and options.train_epochs > 1 and epoch >= options.train_epochs // 2
        began = time.monotonic()
        with training.interruptible():
            trained = training.cohort.train(
                train.images,
                train.labels,
                epochs=1,
                lr=options.lr_teacher * (0.1 if decayed else 1),
                batch_size=options.batch_train,
                dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
                generators=training.generators,
            )
        for number, loss in zip(numbers, trained.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"expert {number} diverged in epoch {epoch + 1}: lower --lr_teacher, which is "
                    f"{options.lr_teacher}, --mom or --l2; the experts before it are kept"
                )
        training.end_epoch()
        is_last = training.epoch == options.train_epochs
        # The last is kept as an expert, but with several processes another may be cut off before.
        if ranks.world() > 1 if is_last else training.is_much_unkept(options.train_epochs):
            training.keep()
        with training.interruptible():
            networks = training.cohort.networks
            tested = [accuracy(net, data.test.images, data.test.labels) for net in networks]
        progress.set_description(f"expert {training}", refresh=False)
        progress.set_postfix_str(
            f"train {trained.accuracies.mean():.1%} test {statistics.fmean(tested):.1%}",
            refresh=False,
        )
        progress.update()
        seconds.append(time.monotonic() - began)
        if len(seconds) == EPOCHS_TO_JUDGE and ranks.is_main():
            left = int(progress.total - progress.n)
            progress.write(time_left(seconds, left, unit="epoch"), file=sys.stdout)
    return training.trajectories


if __name__ == "__main__":
    sys.exit(run_script(main))
