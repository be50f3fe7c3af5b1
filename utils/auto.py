"""What `auto` stands for: choices made from counted cost and free memory, before the work.

None of them changes a result but by rounding. The rates are rough on purpose: they only have to
tell seconds from hours. docs/performance.md has the measurements behind them.
"""

import torch

from utils import distributed
from utils.cost import NetworkCost, adjoint_bytes, full_graph_bytes, pieces_within
from utils.errors import UserError
from utils.execution import check_compiles
from utils.memory import free_bytes

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
    rate = CUDA_RATE if device.type == "cuda" else CPU_THREAD_RATE * torch.get_num_threads()
    seconds, price = flop / rate, FUNCTIONS[work] * layers * COMPILE_SECONDS
    if seconds * SAVED_BY_COMPILING[device.type][work] <= price:
        return False
    try:
        check_compiles(device)
    except UserError:
        print("compile auto: off, compiling fails here: is there a C++ compiler (g++)?")
        return False
    print(f"compile auto: on, about {_duration(seconds)} of {work}, {_duration(price)} to compile")
    return True


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
    return pieces_within(batch, _budget(device) // max(1, adjoint_bytes(cost, students)))


def choose_at_once(
    asked: int | None, cost: NetworkCost, device: torch.device, *, batch: int, networks: int
) -> int:
    """How many of `networks`, which the processes divide, each trains in step.

    On a CPU one, since together they are no faster there. All processes get the same answer though
    their free memory differs: the division rests on it.
    """
    own = -(-networks // distributed.world())
    if asked is not None:
        return min(asked, own)
    if device.type == "cpu":
        return 1
    fit = _budget(device) // (2 * batch * cost.activation_bytes)
    return distributed.least(max(1, min(own, fit)))


def _budget(device: torch.device) -> int:
    return min(WORKING_SET[device.type], free_bytes(device) // 2)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
