"""How a distillation will be computed: what its options leave to `auto`, decided beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from utils import distributed
from utils.auto import choose_at_once, choose_compile, choose_micro_batch, choose_unroll
from utils.cost import network_cost, outer_step_flop, training_flop
from utils.errors import UserError
from utils.options import DistillOptions


@dataclass(frozen=True)
class RunPlan:
    """Kept in the checkpoint, so that a run that is continued computes as it began."""

    compiled: bool
    unroll: str
    micro_batch: int
    eval_compiled: bool
    eval_at_once: int


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
    num_images, world = num_classes * options.ipc, distributed.world()
    batch = min(options.batch_syn or num_images, num_images)
    _check_processes(options.trajectories, batch)
    divides_batches = world > 1 and options.trajectories == 1
    students = options.trajectories if divides_batches else options.trajectories // world
    count = partial(network_cost, channels=channels, num_classes=num_classes, image_size=image_size)
    cost = count(options.model)
    eval_costs = [count(model) for model in options.evaluation_models]

    def was(name: str, asked: Any) -> Any:
        """What auto was taken for, or what is asked."""
        return recorded.get(name, asked) if asked in (None, "auto") else asked

    outer_flop = outer_step_flop(cost, syn_steps=options.syn_steps, batch=batch * students)
    evaluations = 2 * (options.Iteration // options.eval_it + 1) if options.eval_it else 0
    eval_flop = sum(
        training_flop(each, images=num_images, epochs=options.epoch_eval_train)
        for each in eval_costs
    )
    compiled = choose_compile(
        was("compiled", options.compile),
        options.Iteration * outer_flop // (world if divides_batches else 1),
        device,
        work="outer steps",
        layers=cost.layers,
    )
    plan = RunPlan(
        compiled=compiled,
        unroll=choose_unroll(
            options.unroll if divides_batches else was("unroll", options.unroll),
            cost,
            device,
            compiled=compiled,
            divided=divides_batches or options.micro_batch is not None,
            syn_steps=options.syn_steps,
            images=batch * students,
        ),
        micro_batch=distributed.least(
            choose_micro_batch(
                was("micro_batch", options.micro_batch),
                cost,
                device,
                batch=-(-batch // world) if divides_batches else batch,
                students=students,
            )
        ),
        eval_compiled=choose_compile(
            was("eval_compiled", options.compile),
            evaluations * options.num_eval * eval_flop // world,
            device,
            work="training",
            layers=sum(each.layers for each in eval_costs),
        ),
        eval_at_once=choose_at_once(
            options.eval_at_once,
            max(eval_costs, key=lambda each: each.activation_bytes),
            device,
            batch=min(options.batch_train, num_images),
            networks=options.num_eval,
        ),
    )
    return distributed.from_main(plan)  # free memory differs, the plan must not


def _check_processes(trajectories: int, batch: int) -> None:
    """UserError where there are more processes than work for them."""
    world = distributed.world()
    if trajectories > 1 and trajectories % world:
        raise UserError(
            f"--trajectories {trajectories} cannot be divided over {world} processes: "
            f"choose a multiple of {world}, or 1 to divide the inner batches"
        )
    if trajectories == 1 and world > batch:
        raise UserError(
            f"{world} processes are more than the {batch} images of an inner batch: start fewer"
        )
