"""Train experts on the full training set and keep their parameter trajectories.

    python buffer.py --dataset CIFAR10

A second call continues with the next expert. Expert i depends on --seed and i alone.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from networks import build_network
from utils import expert_buffer
from utils.augment import active_groups
from utils.config import fixed_values, packaged_yaml, resolve, run_script
from utils.data import ImageDataset, find_dataset, read_dataset
from utils.device import default_device
from utils.errors import UserError
from utils.expert_buffer import ExpertKind
from utils.files import check_writable
from utils.options import BufferOptions
from utils.progress import progress_bar
from utils.rng import derive_seed, stream
from utils.training import accuracy, scale_learning_rate, train_epoch


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    return packaged_yaml(given.get("dataset", BufferOptions.dataset), "buffer")


def main(argv: Sequence[str]) -> int:
    resolved = resolve(BufferOptions, argv, description=__doc__ or "", find_yaml=find_yaml)
    options = resolved.options
    dsa_groups = active_groups(dsa=options.dsa, strategy=options.dsa_strategy)
    found = find_dataset(
        options.dataset,
        data_path=options.data_path,
        subset=options.subset,
        res=options.res,
        zca=options.zca,
    )
    resolved.set("res", found.image_size, resolved.sources["res"])
    options = resolved.options
    folder = ExpertKind.of(
        found, zca=options.zca, model=options.model, data_path=options.data_path
    ).folder(options.buffer_path)
    check_writable(folder)
    expert_buffer.begin(folder, fixed_values(options))
    per_file = options.save_interval
    missing = expert_buffer.missing_experts(folder, options.num_experts, experts_per_file=per_file)
    print(f"buffer.py\n{resolved.table()}")
    print(f"{options.num_experts - len(missing)} of {options.num_experts} experts are in {folder}")
    if not missing:
        return 0

    data = read_dataset(found, zca=options.zca).to(default_device())
    with progress_bar(total=len(missing) * options.train_epochs, unit="epoch") as progress:
        for number in missing:
            expert = train_expert(options, data, number, dsa_groups, progress)
            expert_buffer.save_expert(folder, number, expert, experts_per_file=per_file)
    print(f"{options.num_experts} experts of {options.train_epochs} epochs are in {folder}")
    return 0


def train_expert(
    options: BufferOptions,
    data: ImageDataset,
    number: int,
    dsa_groups: tuple[str, ...] | None,
    progress: tqdm,
) -> expert_buffer.Expert:
    """Snapshots before the first epoch and after each of expert `number`."""
    train = data.require_train()
    network = build_network(
        options.model,
        channels=data.channels,
        num_classes=data.num_classes,
        image_size=data.image_size,
        seed=derive_seed(options.seed, "expert", number, "init"),
    ).to(train.images.device)
    generator = stream(options.seed, "expert", number, "minibatch")
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.lr_teacher, momentum=options.mom, weight_decay=options.l2
    )
    if options.compile:
        network.compile()
    trajectory = [expert_buffer.snapshot(network)]
    for epoch in range(options.train_epochs):
        if options.decay and epoch > 0 and epoch == options.train_epochs // 2:
            scale_learning_rate(optimizer, 0.1)
        loss, train_acc = train_epoch(
            network,
            optimizer,
            train.images,
            train.labels,
            batch_size=options.batch_train,
            dsa_groups=dsa_groups,
            generator=generator,
        )
        if not loss.isfinite():
            raise UserError(
                f"expert {number} diverged in epoch {epoch + 1}: lower --lr_teacher, which is "
                f"{options.lr_teacher}; the experts before it are kept"
            )
        test_acc = accuracy(network, data.test.images, data.test.labels)
        trajectory.append(expert_buffer.snapshot(network))
        progress.set_description(f"expert {number}", refresh=False)
        progress.set_postfix_str(f"train {train_acc:.1%} test {test_acc:.1%}", refresh=False)
        progress.update()
    return trajectory


if __name__ == "__main__":
    sys.exit(run_script(main))
