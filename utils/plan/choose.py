"""What `auto` stands for: choices made from counted cost and free memory, before the work.

None of them changes a result but by rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.compute.contract import UntraceableError
from utils.compute.cost import Training, pieces_within
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.progress import duration
from utils.methods.base import Work
from utils.methods.registry import METHODS
from utils.options import DistillOptions
from utils.plan.machine import Kind, Machine
from utils.plan.sizes import DataSize

# The forward pass that occupies a GPU by itself: ConvNetD3's on 64 images of CIFAR. A guess.
FILLING_FLOP = 64 * 10**8


@dataclass(frozen=True)
class RunPlan:
    """How a distillation computes. Kept in its checkpoint, so that it continues as it began."""

    compiled: bool
    unroll: str
    micro_batch: int
    eval_compiled: bool
    eval_at_once: int


@dataclass(frozen=True)
class TrainingPlan:
    """How networks are trained: compiled or not, and how many of them together in a process."""

    training: Training
    compiled: bool
    at_once: int


def plan_run(
    options: DistillOptions,
    size: DataSize,
    work: Work,
    machine: Machine,
    *,
    recorded: Mapping[str, Any],
) -> RunPlan:
    """Decide what `auto` stands for, or take it from the plan `recorded` by an earlier call.

    UserError where options and processes contradict each other.
    """

    def recorded_or(asked: Any, name: str) -> Any:
        return recorded.get(name, asked) if asked in (None, "auto") else asked

    compiled = choose_compile(
        recorded_or(options.compile, "compiled"),
        machine,
        options.Iteration * machine.seconds(work.flop, work.passes, "outer steps"),
        kind="outer steps",
        layers=work.compiled_layers,
    )
    divided = work.divides_batches or options.micro_batch is not None
    unroll = choose_unroll(
        options.unroll if divided else recorded_or(options.unroll, "unroll"),
        work,
        machine,
        compiled=compiled,
        divided=divided,
    )
    micro_batch = choose_micro_batch(recorded_or(options.micro_batch, "micro_batch"), work, machine)
    trainings = size.evaluation_trainings(options)
    networks = options.num_eval
    largest = max(trainings, key=lambda each: each.cost.activation_bytes)
    at_once = choose_at_once(options.eval_at_once, largest, machine, networks=networks)
    evaluation = sum(
        machine.training_seconds(training, networks=networks, at_once=at_once)
        for training in trainings
    )
    eval_compiled = choose_compile(
        recorded_or(options.compile, "eval_compiled"),
        machine,
        len(METHODS[options.method].sets) * evaluations_left(options) * evaluation,
        layers=sum(training.layers for training in trainings),
    )
    plan = RunPlan(compiled, unroll, micro_batch, eval_compiled, at_once)
    return ranks.from_main(plan)  # compiling may fail on one machine alone


def evaluations_left(options: DistillOptions, evaluated: int = -1) -> int:
    """How many iterations are still evaluated when `evaluated` was the last one; -1: none was.

    They are the multiples of eval_it, from 0 on, and the end.
    """
    every, end = options.eval_it, options.Iteration
    if every == 0 or evaluated >= end:
        return 0
    return end // every - evaluated // every + (end % every > 0)


def plan_training(
    training: Training,
    machine: Machine,
    *,
    networks: int,
    missing: int | None = None,
    compile: str,
    at_once: int | None,
) -> TrainingPlan:
    """Decide how `networks` are trained, or those of them that are still `missing`.

    Compiling is judged by all of them, so that a call that continues decides as the first one did.
    """
    left = networks if missing is None else missing
    together = choose_at_once(at_once, training, machine, networks=left)
    seconds = machine.training_seconds(training, networks=networks, at_once=together)
    compiled = choose_compile(compile, machine, seconds, layers=training.layers)
    return TrainingPlan(training, compiled, together)


def choose_compile(
    asked: str | bool,
    machine: Machine,
    seconds: float,
    *,
    kind: Kind = "training",
    layers: int,
) -> bool:
    """Decide whether to compile functions of `layers` in all, for work of `seconds` uncompiled.

    A bool is a choice made before. UserError where "on" is asked for and compiling fails.
    """
    if layers == 0:
        return False
    if asked != "auto":
        if asked in ("on", True):
            machine.check_compiles()
        return asked in ("on", True)
    price = layers * machine.speed.compile_seconds
    if seconds - seconds * (1 - machine.speed.saved[kind]) <= price:
        return False
    if machine.device == "mps":
        return False  # what the compiler makes for it has not been tried here
    try:
        machine.check_compiles()
    except UntraceableError as error:
        machine.say(f"compile auto: off, {error.problem}")
        return False
    except UserError:
        machine.say("compile auto: off, compiling fails here: is there a C++ compiler (g++)?")
        return False
    machine.say(
        f"compile auto: on, about {duration(seconds)} of {kind}, {duration(price)} to compile"
    )
    return True


def choose_unroll(
    asked: str,
    work: Work,
    machine: Machine,
    *,
    compiled: bool,
    divided: bool,
) -> str:
    """ "adjoint" or "autograd": the full graph only where it is small and nothing else helps.

    `divided` is whether batches are split up, over processes or by --micro_batch.
    """
    if asked == "autograd" and work.graph_bytes is None:
        raise UserError(
            "--unroll autograd: this method has no graph over steps to keep; leave it out"
        )
    if asked == "autograd" and divided:
        raise UserError(
            "--unroll autograd keeps whole batches in one process: leave --micro_batch and "
            "torchrun out, or choose --unroll adjoint"
        )
    if asked != "auto":
        return asked
    if work.graph_bytes is None:
        return "adjoint"
    if not (machine.is_gpu or compiled or divided) and work.graph_bytes < machine.free / 10:
        machine.say(
            f"unroll auto: autograd, whose graph takes about {work.graph_bytes / 1e9:.2g} GB"
        )
        return "autograd"
    machine.say("unroll auto: adjoint")
    return "adjoint"


def choose_micro_batch(asked: int | None, work: Work, machine: Machine) -> int:
    """Images of one piece of a batch of each student, so that together they fit the budget."""
    if asked is not None:
        return min(asked, work.batch)
    image = max(1, work.students * work.image_bytes)
    return pieces_within(work.batch, machine.budget // image)


def choose_at_once(
    asked: int | None, training: Training, machine: Machine, *, networks: int
) -> int:
    """How many of `networks`, which the processes divide, each trains together.

    On a CPU one, since together they are no faster there. On a GPU as many as it takes to fill it:
    large batches fill it alone.
    """
    own = max(1, -(-networks // machine.processes))
    if asked is not None:
        return min(asked, own)
    if not machine.is_gpu:
        return 1
    to_fill = FILLING_FLOP // max(1, training.batch * training.cost.flop)
    return max(1, min(own, to_fill, machine.budget // training.bytes))
