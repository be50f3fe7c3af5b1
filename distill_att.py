"""Distil a data set into a few images per class by matching expert trajectories (ATT).

    python distill_att.py --ipc 10 --syn_steps 50

takes its defaults from configs/<dataset>/ipc<ipc>.yaml and its experts from buffer.py. The same
--run_name continues a run that was interrupted, from its last checkpoint.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.compute.contract import check_head, check_known, check_repeatable
from utils.compute.cost import fitting_models
from utils.compute.device import default_device, storage_dtype, use_device, wait_for
from utils.config.resolve import (
    DEFAULT,
    FOUND,
    Resolved,
    check_unchanged,
    fixed_values,
    nearest_row,
    resolve,
)
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.progress import progress_bar
from utils.core.script import run_script
from utils.data.dataset import read_dataset
from utils.data.identity import KEY, DataIdentity, identity_of
from utils.data.real_images import check_ipc, class_labels, initial_images
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.experts.kind import ExpertKind, NoExperts, open_experts
from utils.methods.base import Method, Setting
from utils.methods.outer_state import Diverged, OuterState
from utils.methods.registry import (
    DEFAULT_METHOD,
    METHODS,
    check_own_flags,
    check_same_method,
    foreign_flags,
)
from utils.options import DistillOptions
from utils.plan.choose import evaluations_left
from utils.plan.distillation import DistillCall
from utils.plan.experts import ExpertsCall, ExpertsToMake
from utils.plan.machine import Machine
from utils.plan.room import check_room
from utils.plan.sizes import DataSize, settle_images
from utils.run.directory import RunDir
from utils.run.recorder import BEST, Recorder

MAX_REWINDS = 3


@dataclass(frozen=True)
class Prepared:
    """What a run works with, and how: all that is found before anything is written."""

    call: DistillCall
    source: Source
    images: DataIdentity
    experts: ExpertBuffer | ExpertsToMake | None  # to be made: a dry run
    run: RunDir
    checkpoint: dict[str, Any] | None


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


def prepare(resolved: Resolved[DistillOptions]) -> Prepared:
    """Find images, experts and run, record in `resolved` what they settle, and plan the call."""
    check_flags(resolved)
    use_device(resolved.options.device)
    check_known([resolved.options.model])
    source = settle_images(resolved)
    size = DataSize.of(source)
    check_model(resolved.options, size)
    check_choices(resolved.options, source)
    images = identity_of(source, resolved.options.data_path)
    experts = open_chosen_experts(resolved, source, images)
    run = name_run(resolved)
    checkpoint = readable_checkpoint(run)
    settle_lengths(resolved, source, experts, checkpoint)
    if checkpoint is not None:
        check_resumable(run, checkpoint, resolved.options, images, experts)
    machine = Machine.here(default_device())
    call = DistillCall.planned(resolved.options, size, machine, checkpoint)
    return Prepared(call, source, images, experts, run, checkpoint)


def check_flags(resolved: Resolved[DistillOptions]) -> None:
    """UserError where flags contradict each other or belong to another method."""
    options = resolved.options
    check_own_flags(options.method, resolved.sources)
    METHODS[options.method].check(options, resolved.given_by_hand)


def check_choices(options: DistillOptions, source: Source) -> None:
    """UserError where the images do not suffice for what is asked of them."""
    if options.select == "val" and "val" not in source.labels:
        raise UserError(
            "--select val needs images held out of the training set: pass --val_fraction 0.1, say, "
            "to buffer.py and distill_att.py alike, or choose --select test or last"
            + (", or put images into val/ beside test/" if source.name == "folder" else "")
        )
    if options.pix_init == "real":
        advice = "choose at most that many, add images, or pass --pix_init noise"
        check_ipc(options.ipc, source.labels["train"], source.class_names, advice=advice)


def check_model(options: DistillOptions, size: DataSize) -> None:
    """UserError where the network of experts and students does not serve as such."""
    check_repeatable(options.model, **size.shape)
    if METHODS[options.method].takes_features:
        check_head(options.model, **size.shape, why=f"--method {options.method}")


def open_chosen_experts(
    resolved: Resolved[DistillOptions], source: Source, images: DataIdentity
) -> ExpertBuffer | ExpertsToMake | None:
    """Find and check the experts, where the method needs some; a model or zca not given by hand
    follows what is there. A dry run takes what is still to be made.
    """
    options = resolved.options
    if not METHODS[options.method].needs_experts:
        return None
    asked = ExpertKind.of(options)
    to_make = ExpertsToMake.of(asked, options.buffer_path, epochs=least_epochs(resolved))
    try:
        found, experts = open_experts(
            asked,
            options.buffer_path,
            images=images,
            channels=source.channels,
            num_classes=len(source.class_names),
            model_fixed=resolved.given_by_hand("model"),
            zca_fixed=resolved.given_by_hand("zca"),
            command=to_make.command,
            max_files=options.max_files,
            max_experts=options.max_experts,
            skip_bad=options.skip_bad_buffers,
        )
    except NoExperts:
        if options.dry_run:
            return to_make
        raise
    if found != asked:
        print(
            f"only other experts than those of the row (model {asked.model}, zca {asked.zca}) are "
            f"there: using {experts.folder} (model {found.model}, zca {found.zca}); "
            f"for the row's own: {to_make.command}"
        )
    for name in ("zca", "model"):
        if getattr(found, name) != getattr(asked, name):
            resolved.set(name, getattr(found, name), str(experts.folder))
    return experts


def least_epochs(resolved: Resolved[DistillOptions]) -> int:
    """The epochs that experts need for the lengths that are given; those to be found follow from
    the experts.
    """
    found: dict[str, Any] = {
        name: 1 for name in ("expert_epochs", "max_start_epoch") if resolved.is_open(name)
    }
    return replace(resolved.options, **found).last_epoch


def name_run(resolved: Resolved[DistillOptions]) -> RunDir:
    """The run directory; a new one where the run has no name yet, or begins anew."""
    options = resolved.options
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    run = RunDir.of(options, now if options.run_name is None else options.run_name)
    if options.run_name is None or options.restart:
        run = ranks.from_main(run.unused())
        resolved.set("run_name", run.path.name, DEFAULT)
        resolved.set("restart", False, DEFAULT)  # whoever continues does not
        again = ["--no_restart"] if options.restart else []
        stopping.continue_with("--run_name", run.path.name, *again)
    return run


def readable_checkpoint(run: RunDir) -> dict[str, Any] | None:
    """Load the run's checkpoint, if any; refuse a run that cannot be continued without one."""
    check_writable(run.path)
    checkpoint = run.agreed_checkpoint()
    if checkpoint is None and run.has_steps():
        raise UserError(
            f"{run.path} holds a run without a checkpoint, which cannot be continued: "
            "choose another --run_name"
        )
    return checkpoint


def settle_lengths(
    resolved: Resolved[DistillOptions],
    source: Source,
    experts: ExpertBuffer | ExpertsToMake | None,
    checkpoint: Mapping[str, Any] | None,
) -> None:
    """Find N_S, N_T and start epochs where nobody gives them; a run that was begun keeps its own,
    and its rates. UserError where the experts are too short for what was given.
    """
    options = resolved.options
    spec = METHODS[options.method]
    recorded = checkpoint["config"] if checkpoint else {}
    for name in resolved.open_names:
        if name in recorded:
            resolved.set(name, recorded[name], "recorded in the run")
    if experts is None:
        return
    lengths = spec.find_lengths(
        options,
        epochs=experts.epochs,
        steps_an_epoch=-(-len(source.labels["train"]) // options.batch_train),
        is_open=resolved.is_open,
    )
    for name, value in lengths.items():
        resolved.set(name, value, FOUND)
    spec.check_experts(resolved.options, experts)


def check_resumable(
    run: RunDir,
    checkpoint: Mapping[str, Any],
    options: DistillOptions,
    images: DataIdentity,
    experts: ExpertBuffer | ExpertsToMake | None,
) -> None:
    """Refuse to continue a run with other settings, images or experts."""
    begun = checkpoint["config"].get("method", DEFAULT_METHOD)
    check_same_method(begun, options.method, where=str(run.path))
    check_unchanged(
        checkpoint["config"], fixed_values(options), where=run.path, instead="--run_name"
    )
    images.check_same_as(
        checkpoint.get(KEY),
        ("train", "test", "val"),
        what=f"run {run.path}",
        advice="give the --data_path that it is from, or another --run_name",
    )
    before = checkpoint["num_experts"]
    if isinstance(experts, ExpertBuffer) and before != len(experts):
        raise UserError(
            f"{run.path} was begun with {before} experts, now there are {len(experts)} in "
            f"{experts.folder}: pass --max_experts {before} or another --run_name"
        )


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
    enough = f" ({least} would do: --train_epochs {least})" if least < experts.epochs else ""
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
    images = initial_images(data, options.ipc, options.pix_init, options.seed).to(device, dtype)
    data = data if prepared.call.work.keeps_train else data.without_train()
    data = data.to(device, dtype)
    labels = class_labels(data.num_classes, options.ipc, device)
    method = spec.build(Setting.of(options, data, labels, experts, plan))
    if prepared.checkpoint is None:
        find_rates(resolved, method, images)
    options = resolved.options
    state = OuterState(
        spec.learned(options, images),
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


def find_rates(resolved: Resolved[DistillOptions], method: Method, images: Tensor) -> None:
    """Find the rates that nobody gives, by a few outer steps that are not taken."""
    options = resolved.options
    rates = METHODS[options.method].find_rates(options, method, images, is_open=resolved.is_open)
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
