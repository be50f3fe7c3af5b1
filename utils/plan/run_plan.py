"""How a distillation will be computed: how much work it is, and what its options leave to `auto`,
decided beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from utils.compute.cost import NetworkCost, network_cost, outer_step_flop, training_flop
from utils.core import ranks
from utils.core.errors import UserError
from utils.options import DistillOptions
from utils.plan.auto import choose_at_once, choose_compile, choose_micro_batch, choose_unroll


@dataclass(frozen=True)
class RunPlan:
    """Kept in the checkpoint, so that a run that is continued computes as it began."""

    compiled: bool
    unroll: str
    micro_batch: int
    eval_compiled: bool
    eval_at_once: int


@dataclass(frozen=True)
class Workload:
    """What a distillation computes, by its options; of several processes, what this one does.

    `students` take steps on batches of `batch` images each, `whole_batch` by all processes.
    `step_flop` are those of an outer step; `evaluation_flop` those that train all networks of an
    evaluation of one set, by all processes.
    """

    cost: NetworkCost
    evaluation_costs: tuple[NetworkCost, ...]
    divides_batches: bool
    students: int
    batch: int
    whole_batch: int
    step_flop: int
    evaluation_flop: int

    @classmethod
    def of(
        cls,
        options: DistillOptions,
        *,
        channels: int,
        num_classes: int,
        image_size: int,
        world: int = 1,
    ) -> "Workload":
        """That of one of `world` processes."""
        count = partial(
            network_cost, channels=channels, num_classes=num_classes, image_size=image_size
        )
        cost, costs = count(options.model), tuple(map(count, options.evaluation_models))
        images = num_classes * options.ipc
        batch = min(options.batch_syn or images, images)
        divides_batches = world > 1 and options.trajectories == 1
        students = options.trajectories if divides_batches else options.trajectories // world
        flop = outer_step_flop(cost, syn_steps=options.syn_steps, batch=batch * students)
        epochs = options.epoch_eval_train
        training = sum(training_flop(each, images=images, epochs=epochs) for each in costs)
        return cls(
            cost=cost,
            evaluation_costs=costs,
            divides_batches=divides_batches,
            students=students,
            batch=-(-batch // world) if divides_batches else batch,
            whole_batch=batch,
            step_flop=flop // world if divides_batches else flop,
            evaluation_flop=options.num_eval * training,
        )


def evaluations_left(options: DistillOptions, evaluated: int = -1) -> int:
    """How many iterations are still evaluated when `evaluated` was the last one; -1: none was.

    They are the multiples of eval_it, from 0 on, and the end.
    """
    every, end = options.eval_it, options.Iteration
    if every == 0 or evaluated >= end:
        return 0
    return end // every - evaluated // every + (end % every > 0)


def plan_run(
    options: DistillOptions,
    *,
    channels: int,
    num_classes: int,
    image_size: int,
    device: torch.device,
    recorded: Mapping[str, Any],
) -> RunPlan:
    """Decide what `auto` stands for, or take it from the plan `recorded` by an earlier call.

    UserError where the options, the processes and each other do not go together.
    """
    world = ranks.world()
    work = Workload.of(
        options, channels=channels, num_classes=num_classes, image_size=image_size, world=world
    )
    _check_processes(options.trajectories, work.whole_batch)

    def was(name: str, asked: Any) -> Any:
        """What auto was taken for, or what is asked."""
        return recorded.get(name, asked) if asked in (None, "auto") else asked

    compiled = choose_compile(
        was("compiled", options.compile),
        options.Iteration * work.step_flop,
        device,
        work="outer steps",
        layers=work.cost.layers,
    )
    divided = work.divides_batches or options.micro_batch is not None
    plan = RunPlan(
        compiled=compiled,
        unroll=choose_unroll(
            options.unroll if divided else was("unroll", options.unroll),
            work.cost,
            device,
            compiled=compiled,
            divided=divided,
            syn_steps=options.syn_steps,
            images=work.whole_batch * work.students,
        ),
        micro_batch=ranks.min_over_ranks(
            choose_micro_batch(
                was("micro_batch", options.micro_batch),
                work.cost,
                device,
                batch=work.batch,
                students=work.students,
            )
        ),
        eval_compiled=choose_compile(
            was("eval_compiled", options.compile),
            2 * evaluations_left(options) * work.evaluation_flop // world,  # raw and EMA
            device,
            work="training",
            layers=sum(each.layers for each in work.evaluation_costs),
        ),
        eval_at_once=choose_at_once(
            options.eval_at_once,
            max(work.evaluation_costs, key=lambda each: each.activation_bytes),
            device,
            batch=min(options.batch_train, num_classes * options.ipc),
            networks=options.num_eval,
        ),
    )
    return ranks.from_main(plan)  # free memory differs, the plan must not


def _check_processes(trajectories: int, batch: int) -> None:
    """UserError where there are more processes than work for them."""
    world = ranks.world()
    if trajectories > 1 and trajectories % world:
        raise UserError(
            f"--trajectories {trajectories} cannot be divided over {world} processes: "
            f"choose a multiple of {world}, or 1 to divide the inner batches"
        )
    if trajectories == 1 and world > batch:
        raise UserError(
            f"{world} processes are more than the {batch} images of an inner batch: start fewer"
        )
