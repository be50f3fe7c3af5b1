"""Train experts on the full training set and keep their parameter trajectories.

    python buffer.py --dataset CIFAR10

A second call continues with the next expert. Expert i depends on --seed and i alone. Under torchrun
the experts are divided over the processes.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils import distributed, expert_buffer
from utils.augment import active_groups
from utils.auto import choose_at_once, choose_compile
from utils.config import fixed_values, packaged_yaml, resolve, run_script
from utils.cost import network_cost, training_flop
from utils.data import ImageDataset, find_dataset, read_dataset
from utils.device import default_device
from utils.errors import UserError
from utils.execution import Execution
from utils.expert_buffer import ExpertKind
from utils.files import check_writable
from utils.options import BufferOptions
from utils.precision import compute_dtype, storage_dtype, use_precision
from utils.progress import progress_bar
from utils.rng import derive_seed, stream
from utils.sources import Source
from utils.training import Cohort, Recipe, accuracy


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    return packaged_yaml(given.get("dataset", BufferOptions.dataset), "buffer")


def main(argv: Sequence[str]) -> int:
    with distributed.process_group():
        return make_experts(argv)


def make_experts(argv: Sequence[str]) -> int:
    resolved = resolve(BufferOptions, argv, description=__doc__ or "", find_yaml=find_yaml)
    options = resolved.options
    device = default_device()
    precision = use_precision(options.precision, device)
    with distributed.main_first():  # it may download
        found = find_dataset(
            options.dataset,
            data_path=options.data_path,
            subset=options.subset,
            res=options.res,
            zca=options.zca,
        )
    resolved.set("res", found.image_size, resolved.sources["res"])
    resolved.set("precision", precision, resolved.sources["precision"])
    options = resolved.options
    folder = ExpertKind.of(
        found, zca=options.zca, model=options.model, data_path=options.data_path
    ).folder(options.buffer_path)
    check_writable(folder)
    if distributed.world() > options.num_experts:
        raise UserError(
            f"{distributed.world()} processes are more than --num_experts {options.num_experts}: "
            "start fewer"
        )
    per_file = options.save_interval
    missing = expert_buffer.missing_experts(folder, options.num_experts, experts_per_file=per_file)
    with distributed.main_first():
        expert_buffer.begin(folder, fixed_values(options), adding=bool(missing))
    print(f"buffer.py\n{resolved.table()}")
    print(f"{options.num_experts - len(missing)} of {options.num_experts} experts are in {folder}")
    distributed.barrier()  # nothing is written before everyone has looked
    if not missing:
        return 0

    recipe, at_once = choose_recipe(options, found, device, len(missing))
    with distributed.main_first():  # it fills the cache
        data = read_dataset(found, zca=options.zca).to(device, storage_dtype(precision))
    rounds = distributed.shares(missing, at_once)
    with progress_bar(total=len(rounds) * options.train_epochs, unit="epoch") as progress:
        for own in rounds:
            experts = train_experts(options, recipe, data, own, progress) if own else {}
            for number, expert in sorted(distributed.gather_on_main(experts).items()):
                expert_buffer.save_expert(folder, number, expert, experts_per_file=per_file)
    print(f"{options.num_experts} experts of {options.train_epochs} epochs are in {folder}")
    return 0


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
    epochs = options.num_experts * options.train_epochs / distributed.world()
    flop = epochs * training_flop(cost, images=images, epochs=1)
    compiled = choose_compile(options.compile, flop, device, work="training", layers=cost.layers)
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
        execution=Execution.on(device, compiled=compiled),
        dtype=compute_dtype(options.precision),
    )
    return recipe, at_once


def train_experts(
    options: BufferOptions, recipe: Recipe, data: ImageDataset, numbers: list[int], progress: tqdm
) -> dict[int, expert_buffer.Expert]:
    """For each of the experts `numbers` its snapshots: before the first epoch and after each."""
    train = data.require_train()
    cohort = Cohort(
        recipe,
        [derive_seed(options.seed, "expert", number, "init") for number in numbers],
        device=train.images.device,
        dtype=train.images.dtype,
    )
    generators = [stream(options.seed, "expert", number, "minibatch") for number in numbers]
    trajectories = [[expert_buffer.snapshot(network)] for network in cohort.networks]
    for epoch in range(options.train_epochs):
        decayed = options.decay and options.train_epochs > 1 and epoch >= options.train_epochs // 2
        trained = cohort.train(
            train.images,
            train.labels,
            epochs=1,
            lr=options.lr_teacher * (0.1 if decayed else 1),
            batch_size=options.batch_train,
            dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
            generators=generators,
        )
        for number, loss in zip(numbers, trained.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"expert {number} diverged in epoch {epoch + 1}: lower --lr_teacher, which is "
                    f"{options.lr_teacher}; the experts before it are kept"
                )
        for trajectory, network in zip(trajectories, cohort.networks, strict=True):
            trajectory.append(expert_buffer.snapshot(network))
        tested = [accuracy(net, data.test.images, data.test.labels) for net in cohort.networks]
        progress.set_description(f"expert {_span(numbers)}", refresh=False)
        progress.set_postfix_str(
            f"train {trained.accuracies.mean():.1%} test {statistics.fmean(tested):.1%}",
            refresh=False,
        )
        progress.update()
    return dict(zip(numbers, trajectories, strict=True))


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


if __name__ == "__main__":
    sys.exit(run_script(main))
