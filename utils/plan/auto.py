"""What `auto` stands for: choices made from counted cost and free memory, before the work.

None of them changes a result but by rounding. The rates are rough on purpose: they only have to
tell seconds from hours. docs/performance.md has the measurements behind them.
"""

import torch

from utils.compute.cost import (
    NetworkCost,
    adjoint_bytes,
    full_graph_bytes,
    pieces_within,
    training_bytes,
)
from utils.compute.execution import check_compiles
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.progress import duration
from utils.plan.memory import free_bytes

# Sustained FLOP/s of uncompiled steps: of a CPU thread, of a CUDA device.
CPU_THREAD_RATE, CUDA_RATE = 35e9, 10e12
# Seconds that compiling a function takes for every layer of the network; the functions of each kind
# of work, and the part of its time that compiling them saves.
COMPILE_SECONDS = 12.0
FUNCTIONS = {"outer steps": 2, "training": 1}
# On CUDA, not measured yet, most of what small kernels move.
SAVED_BY_COMPILING = {
    "cpu": {"outer steps": 0.25, "training": 0.3},
    "cuda": {"outer steps": 0.5, "training": 0.5},
}
# What a step holds at the most, where memory allows more: beyond it a CUDA device does not get
# faster, and a CPU, out of its caches, slower.
WORKING_SET = {"cuda": 3 * 2**30, "cpu": 256 * 2**20}


def choose_compile(
    asked: str | bool, flop: float, device: torch.device, *, work: str, layers: int
) -> bool:
    """Whether to compile for `flop` of `work` ("outer steps" or "training") on networks with so
    many layers in all; auto says so where it does. A bool is a choice made before. UserError where
    "on" is asked for and compiling fails.
    """
    if asked != "auto":
        if asked in ("on", True):
            check_compiles(device)
        return asked in ("on", True)
    if not compiling_pays(flop, device, work=work, layers=layers):
        return False
    try:
        check_compiles(device)
    except UserError:
        print("compile auto: off, compiling fails here: is there a C++ compiler (g++)?")
        return False
    seconds = duration(expected_seconds(flop, device, work=work, compiled=False))
    price = duration(_compile_seconds(work, layers))
    print(f"compile auto: on, about {seconds} of {work}, {price} to compile")
    return True


def compiling_pays(flop: float, device: torch.device, *, work: str, layers: int) -> bool:
    """Whether compiling saves more time than it takes."""
    plain, compiled = (
        expected_seconds(flop, device, work=work, compiled=compiled) for compiled in (False, True)
    )
    return plain - compiled > _compile_seconds(work, layers)


def _compile_seconds(work: str, layers: int) -> float:
    return FUNCTIONS[work] * layers * COMPILE_SECONDS


def expected_seconds(flop: float, device: torch.device, *, work: str, compiled: bool) -> float:
    """Seconds that `flop` of `work` take, roughly, and without what small steps cost to launch."""
    rate = CUDA_RATE if device.type == "cuda" else CPU_THREAD_RATE * torch.get_num_threads()
    return flop / rate * (1 - SAVED_BY_COMPILING[device.type][work] * compiled)


def choose_unroll(
    asked: str,
    cost: NetworkCost,
    device: torch.device,
    *,
    compiled: bool,
    divided: bool,
    syn_steps: int,
    images: int,
) -> str:
    """ "adjoint" or "autograd": the full graph only where it is small and nothing else helps.

    `images` are those of an inner step, of all students; `divided` is whether they are split up,
    over processes or by --micro_batch. Prints the choice of auto.
    """
    if asked == "autograd" and divided:
        raise UserError(
            "--unroll autograd keeps whole batches in one process: leave --micro_batch and "
            "torchrun out, or choose --unroll adjoint"
        )
    if asked != "auto":
        return asked
    graph = full_graph_bytes(cost, syn_steps=syn_steps, batch=images)
    if device.type == "cpu" and not compiled and not divided and graph < free_bytes(device) / 10:
        print(f"unroll auto: autograd, whose graph takes about {graph / 1e9:.2g} GB")
        return "autograd"
    print("unroll auto: adjoint")
    return "adjoint"


def choose_micro_batch(
    asked: int | None, cost: NetworkCost, device: torch.device, *, batch: int, students: int
) -> int:
    """Images of one piece of an inner batch of each of `students`."""
    if asked is not None:
        return min(asked, batch)
    return micro_batch_within(_budget(device), cost, batch=batch, students=students)


def micro_batch_within(budget: int, cost: NetworkCost, *, batch: int, students: int) -> int:
    """Images, at least one, of a piece of an inner batch of each of `students`, so that together
    they hold no more than `budget` bytes.
    """
    return pieces_within(batch, budget // max(1, adjoint_bytes(cost, students)))


def choose_at_once(
    asked: int | None, cost: NetworkCost, device: torch.device, *, batch: int, networks: int
) -> int:
    """How many of `networks`, which the processes divide, each trains in step.

    On a CPU one, since together they are no faster there. All processes get the same answer though
    their free memory differs: the division rests on it.
    """
    own = -(-networks // ranks.world())
    if asked is not None:
        return min(asked, own)
    if device.type == "cpu":
        return 1
    fit = networks_within(_budget(device), cost, batch=batch)
    return ranks.min_over_ranks(min(own, fit))


def networks_within(budget: int, cost: NetworkCost, *, batch: int) -> int:
    """How many networks, at least one, train on batches of `batch` images within `budget` bytes."""
    return max(1, budget // training_bytes(cost, batch))


def _budget(device: torch.device) -> int:
    return min(WORKING_SET[device.type], free_bytes(device) // 2)
