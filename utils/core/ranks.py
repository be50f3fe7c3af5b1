"""Several processes started by torchrun: their numbers, and how they exchange values."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Longer than anything that one process does while the others wait, such as an evaluation.
TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """This process's number; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and logs."""
    return rank() == 0


def under_torchrun() -> bool:
    """Whether torchrun started this process, alone or with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int | None:
    """This process's number on its host under torchrun; None without."""
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else None


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun nothing happens.

    They may exchange tensors on the CPU and on CUDA, whichever they compute on. Only the main one
    prints more than errors. After an error the group is not destroyed: that waits for the others,
    which may wait for this one.
    """
    if not under_torchrun():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    silence = nullcontext() if is_main() else redirect_stdout(io.StringIO())
    with silence:
        yield
    dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum the processes' tensors, in place on each of them."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """List the processes' values by rank, on each of them; tensors must be on the CPU."""
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(values: dict[int, T]) -> dict[int, T]:
    """Merge the processes' entries on the main one; the others get nothing."""
    if world() == 1:
        return values
    parts: list[dict[int, T]] | None = [{} for _ in range(world())] if is_main() else None
    dist.gather_object(values, parts)
    return {key: value for part in parts or [] for key, value in part.items()}


def from_main(value: T) -> T:
    """Send the main process's value to all of them."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process before the others: it may download, or fill caches."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def min_over_ranks(value: int) -> int:
    """The smallest of the processes' values, on each of them: what all of them can do."""
    return min(gather(value))


def true_on_any_rank(value: bool) -> bool:
    """Whether `value` is true on at least one of the processes; the same answer on each."""
    if world() == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def rounds_of_this_rank(items: list[T], size: int) -> list[list[T]]:
    """Divide `items` into rounds of `size` a process; returns this process's part of each round."""
    per_round = size * world()
    rounds = [items[start : start + per_round] for start in range(0, len(items), per_round)]
    return [part[rank() * size : (rank() + 1) * size] for part in rounds]
