"""Distil a data set into a few images per class by matching expert trajectories (ATT).

    python distill_att.py --ipc 10 --syn_steps 50

takes its defaults from configs/<dataset>/ipc<ipc>.yaml and its experts from buffer.py. The same
--run_name continues a run that was interrupted, from its last checkpoint.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.compute.cost import fitting_models
from utils.compute.device import default_device, storage_dtype, wait_for
from utils.config.resolve import FOUND, Resolved, nearest_row, resolve
from utils.core import ranks, stopping
from utils.core.progress import progress_bar
from utils.core.script import run_script
from utils.data.dataset import read_dataset
from utils.data.real_images import class_labels
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.methods.base import Method, Setting
from utils.methods.outer_state import Diverged, OuterState
from utils.methods.registry import DEFAULT_METHOD, METHODS, foreign_flags
from utils.options import DistillOptions
from utils.plan.choose import evaluations_left
from utils.plan.experts import ExpertsCall, ExpertsToMake
from utils.plan.machine import Machine
from utils.plan.prepare import Prepared, least_epochs, prepare
from utils.plan.room import check_room
from utils.plan.sizes import DataSize
from utils.run.recorder import BEST, Recorder

MAX_REWINDS = 3


def main(argv: Sequence[str]) -> int:
    with ranks.process_group():
        return run(parse(argv))


def parse(argv: Sequence[str]) -> Resolved[DistillOptions]:
    return resolve(DistillOptions, argv, description=__doc__ or "", find_yaml=find_yaml)


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    """The YAML file that gives defaults: the one named, or the row nearest to what is given.

    Relatives of ATT without a row of their own take ATT's.
    """
    if "config" in given:
        return Path(given["config"])
    dataset = given.get("dataset", DistillOptions.dataset)
    ipc = given.get("ipc", DistillOptions.ipc)
    method = given.get("method", DEFAULT_METHOD)
    path = nearest_row(dataset, ipc, None if method == DEFAULT_METHOD else method)
    if path is None and METHODS[method].options is METHODS[DEFAULT_METHOD].options:
        path = nearest_row(dataset, ipc)
    if path is not None and path.stem.split("_")[0] != f"ipc{ipc}":
        print(f"{dataset} has no row for ipc {ipc}: taking the nearest, {path}")
    return path


def run(resolved: Resolved[DistillOptions]) -> int:
    """Distil as `resolved` says, from the start or the last checkpoint; returns the exit status."""
    prepared = prepare(resolved)
    announce(resolved, prepared)
    ranks.barrier()  # nothing is written before everyone has looked
    if resolved.options.dry_run:
        return 0
    with prepared.run.exclusive(prepared.checkpoint):
        state, recorder = build(resolved, prepared)
        status = run_to_end(resolved.options, prepared.checkpoint, state, recorder)
        recorder.log.finish(status)
    return status


def announce(resolved: Resolved[DistillOptions], prepared: Prepared) -> None:
    """Print what will be done, time, memory and disk; UserError where there is too little room."""
    options, experts, run = resolved.options, prepared.experts, prepared.run
    print(f"distill_att.py -> {run.path}")
    foreign = foreign_flags(options.method)
    to_find = [] if prepared.checkpoint else sorted({*resolved.open_names} - foreign)
    print(resolved.table(whole=options.dry_run, hidden=foreign.union(to_find)))
    if to_find:
        print(f"{', '.join(to_find)}: to be {FOUND}")
    print(prepared.source.describe())
    if isinstance(experts, ExpertBuffer):
        print(f"{len(experts)} experts of {experts.epochs} epochs", *experts.skipped, sep="\n")
    if options.eval_it > 0:
        for needs in fitting_models(options.evaluation_models, **prepared.call.size.shape)[1]:
            print(f"--eval_mode M: {needs}, the images have {options.res}: left out")
        print(f"distilled_best.pt: {BEST[options.select]}")
    # Compiling may have been tried since the call was planned, which takes memory.
    call = replace(prepared.call, machine=Machine.here(default_device()))
    print(f"estimated: {call.time}")
    demand = call.demand(prepared.source, experts, run)
    check_room(demand, call.machine, force=options.force)
    if isinstance(experts, ExpertsToMake):
        announce_experts(resolved, experts, prepared.source, call.machine)


def announce_experts(
    resolved: Resolved[DistillOptions], experts: ExpertsToMake, source: Source, machine: Machine
) -> None:
    """Print the command for experts that are not there, and what it takes; UserError where there is
    too little room for them.
    """
    print(f"no experts are complete in {experts.folder}; make them with: {experts.command}")
    least = least_epochs(resolved)
    would_do = least < experts.epochs and not experts.options.easy_first  # whose order is by length
    enough = f" ({least} would do: --train_epochs {least})" if would_do else ""
    print(f"{len(experts)} experts of {experts.epochs} epochs{enough}")
    call = ExpertsCall.planned(experts.options, DataSize.of(source), experts.missing, machine)
    print(f"estimated: {call.time}")
    check_room(call.demand(source, experts.folder), machine, force=resolved.options.force)


def build(resolved: Resolved[DistillOptions], prepared: Prepared) -> tuple[OuterState, Recorder]:
    """Read the images; make what is learned, and what records the method that learns it."""
    plan, experts = prepared.call.plan, prepared.experts
    assert not isinstance(experts, ExpertsToMake)
    options, device = resolved.options, default_device()
    spec, dtype = METHODS[options.method], storage_dtype(options.precision)
    data = read_dataset(prepared.source, zca=options.zca, val=True)
    images, soft_labels = spec.initial(options, data, experts)
    images = images.to(device, dtype)
    soft_labels = None if soft_labels is None else soft_labels.to(device, dtype)
    data = data if prepared.call.work.keeps_train else data.without_train()
    data = data.to(device, dtype)
    labels = class_labels(data.num_classes, options.ipc, device)
    method = spec.build(Setting.of(options, data, labels, experts, plan))
    if prepared.checkpoint is None:
        find_rates(resolved, method, images, soft_labels)
    options = resolved.options
    state = OuterState(
        spec.learned(options, images, soft_labels),
        images=images,
        syn_lr=spec.syn_lr(options),
        ema_decay=options.ema_decay,
        if_not_finite=spec.if_not_finite,
    )
    recorder = Recorder(
        options,
        run=prepared.run,
        method=method,
        data=data,
        identity=prepared.images,
        labels=labels,
        experts=experts,
        how=asdict(plan),
        evaluations_left=partial(evaluations_left, options),
    )
    return state, recorder


def find_rates(
    resolved: Resolved[DistillOptions],
    method: Method,
    images: Tensor,
    soft_labels: Tensor | None,
) -> None:
    """Find the rates that nobody gives, by a few outer steps that are not taken."""
    options = resolved.options
    rates = METHODS[options.method].find_rates(
        options, method, images, soft_labels, is_open=resolved.is_open
    )
    for name, value in rates.items():
        resolved.set(name, value, FOUND)
    if rates:
        print(f"{FOUND}:", ", ".join(f"{name} {value}" for name, value in rates.items()))


def run_to_end(
    options: DistillOptions,
    checkpoint: Mapping[str, Any] | None,
    state: OuterState,
    recorder: Recorder,
) -> int:
    """Begin the run, or go on from its `checkpoint`; return the exit status."""
    if checkpoint is None:
        recorder.begin()
    else:
        recorder.resume(state, checkpoint)
    while True:
        try:
            take_outer_steps(options, state, recorder)
            break
        except Diverged as reason:
            if options.on_divergence == "rewind" and len(state.rewinds) < MAX_REWINDS:
                recorder.rewind(state, reason)
                continue
            recorder.log_divergence(state, reason)
            recorder.save_last(state)
            after = f" after {len(state.rewinds)} rewinds" if state.rewinds else ""
            print(
                f"distill_att.py: stopped at iteration {state.iteration}{after}: {reason}, under "
                f"another --run_name. The last good set is {recorder.run.distilled('last')}",
                file=sys.stderr,
            )
            return 1
    recorder.log_memory(state)
    recorder.save_last(state)
    best = "best" if options.eval_it > 0 else "last"
    print(f"done: sets and pictures are in {recorder.run.path}{recorder.result()}")
    print(f"next: python eval.py --distilled {recorder.run.distilled(best)}")
    return 0


def take_outer_steps(options: DistillOptions, state: OuterState, recorder: Recorder) -> None:
    """Take outer steps to the last iteration; save and evaluate what is due on the way.

    Raises Diverged where a step cannot be taken, Interrupted behind the step or in the evaluation
    in which a signal came. A step that takes longer then is given up, with the state before it
    kept: a step changes that only when it is computed, and follows from the iteration alone.
    """
    with (
        stopping.deferred(),
        progress_bar(total=options.Iteration, initial=state.iteration, unit="it") as progress,
    ):
        while True:
            save_what_is_due(options, state, recorder)
            if state.iteration >= options.Iteration:
                return
            if recorder.evaluated == state.iteration:
                progress.unpause()  # so that the time left is that of the steps
            began = time.monotonic()
            with recorder.kept(state):
                step = recorder.method.step(state.iteration, state.learned)
                wait_for(state.images.device)
            state.update(step)
            recorder.log_step(state, step, time.monotonic() - began)
            progress.set_postfix_str(recorder.shown(state, step), refresh=False)
            progress.update()
            with recorder.kept(state):
                is_asked_to_end = stopping.received_anywhere()
            if is_asked_to_end:
                recorder.save_checkpoint(state)
                with stopping.abandonable():
                    ranks.barrier()  # torchrun ends everyone once one has left
                raise stopping.Interrupted


def save_what_is_due(options: DistillOptions, state: OuterState, recorder: Recorder) -> None:
    """Save the set, evaluate and write a checkpoint where it is time, after a step."""
    at, is_end = state.iteration, state.iteration == options.Iteration
    saves = at == 0 or is_due(at, options.sets_it)
    evaluates = (
        is_due(at, options.eval_it) or (is_end and options.eval_it > 0)
    ) and recorder.evaluated < at
    if saves:
        recorder.save(state)
    if evaluates:
        recorder.save_checkpoint(state)  # to come back to if the evaluation is cut off
        with stopping.immediate():
            recorder.evaluate(state)
    checkpoints = is_due(at, options.checkpoint_it) or recorder.is_checkpoint_old()
    if evaluates or saves or is_end or checkpoints:
        recorder.save_checkpoint(state)


def is_due(at: int, every: int | None) -> bool:
    """Whether iteration `at` is a multiple of `every`; None and 0 stand for never."""
    return every not in (None, 0) and at % every == 0


if __name__ == "__main__":
    sys.exit(run_script(main))
