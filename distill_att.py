"""Distil a data set into a few images per class by matching expert trajectories (ATT).

    python distill_att.py --ipc 10 --syn_steps 50

takes its defaults from configs/<dataset>/ipc<ipc>.yaml and its experts from buffer.py. The same
--run_name continues a run that was interrupted, from its last checkpoint.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks import canonical_name
from utils.compute.cost import fitting_network, network_cost
from utils.compute.device import compute_dtype, default_device, storage_dtype, use_precision
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork
from utils.config.resolve import (
    DEFAULT,
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
from utils.core.provenance import describe_environment
from utils.core.script import run_script
from utils.data.augment import active_groups
from utils.data.dataset import ImageDataset, find_dataset, read_dataset
from utils.data.real_images import check_ipc, class_labels, initial_images
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.experts.kind import ExpertKind, find_experts
from utils.measure.protocol import HowToRun, Protocol
from utils.methods.outer_state import Diverged, OuterState
from utils.methods.trajectory.lengths import DISTANCES, LENGTH_POLICIES
from utils.methods.trajectory.matching import Matcher, Sampling
from utils.methods.trajectory.pruning import prune_dissimilar
from utils.methods.trajectory.unroll import NOTHING, Objective
from utils.options import DistillOptions
from utils.plan.estimate import distillation_demand, expected_distillation_time
from utils.plan.room import check_room
from utils.plan.run_plan import RunPlan, evaluations_left, plan_run
from utils.run.directory import RunDir
from utils.run.log import MetricsLog
from utils.run.recorder import BEST, Reporter

MAX_REWINDS = 3
STEPS_TO_JUDGE = 5  # outer steps of a call before it says how long the rest takes


def main(argv: Sequence[str]) -> int:
    with ranks.process_group():
        return distil(argv)


def distil(argv: Sequence[str]) -> int:
    resolved = resolve(DistillOptions, argv, description=__doc__ or "", find_yaml=find_yaml)
    check_selection(resolved.options)
    device = default_device()
    precision = use_precision(resolved.options.precision, device)
    source = find_dataset(
        resolved.options.dataset,
        data_path=resolved.options.data_path,
        subset=resolved.options.subset,
        res=resolved.options.res,
        zca=resolved.options.zca,
        val_fraction=resolved.options.val_fraction,
    )
    check_ipc(resolved.options.ipc, source.labels["train"], source.class_names)
    resolved.set("res", source.image_size, resolved.sources["res"])
    resolved.set("precision", precision, resolved.sources["precision"])
    network, experts = open_experts(resolved, source)
    run = name_run(resolved)
    options = resolved.options
    checkpoint = look_at(run, options, experts)
    how = plan_run(
        options,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
        device=device,
        recorded=checkpoint["how"] if checkpoint else {},
    )
    print(f"distill_att.py -> {run.path}\n{resolved.table()}")
    print(f"{len(experts)} experts of {experts.epochs} epochs", *experts.skipped, sep="\n")
    if options.eval_it > 0:
        print(f"distilled_best.pt: {BEST[options.select]}")
    say_what_it_takes(options, source, how, experts, run, checkpoint, device)
    ranks.barrier()  # nothing is written before everyone has looked
    if options.dry_run:
        return 0
    with run.alone(checkpoint):
        if options.load_all:
            experts.read_all()
        data = read_dataset(source, zca=options.zca, val=True)
        images = initial_images(data, options.ipc, options.pix_init, options.seed)
        data = data.without_train().to(device, storage_dtype(precision))
        labels = class_labels(data.num_classes, options.ipc, device)
        state = OuterState(
            images.to(device, storage_dtype(precision)),
            options.lr_teacher,
            lr_img=options.lr_img,
            lr_lr=options.lr_lr,
            ema_decay=options.ema_decay,
        )
        matcher = make_matcher(options, how, network, experts, labels)
        reporter = make_reporter(options, how, run, data, labels, experts)
        status = go_on(options, checkpoint, state, matcher, reporter)
        reporter.log.finish(status)
    return status


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    if "config" in given:
        return Path(given["config"])
    dataset = given.get("dataset", DistillOptions.dataset)
    ipc = given.get("ipc", DistillOptions.ipc)
    path = nearest_row(dataset, ipc)
    if path is not None and path.stem != f"ipc{ipc}":
        print(f"{dataset} has no row for ipc {ipc}: taking the nearest, {path}")
    return path


def check_selection(options: DistillOptions) -> None:
    """UserError where the best iteration is to be chosen on images that are not held out."""
    if options.select == "val" and options.val_fraction == 0:
        raise UserError(
            "--select val needs images held out of the training set: pass --val_fraction 0.1, say, "
            "to buffer.py and distill_att.py alike, or choose --select test or last"
        )


def open_experts(
    resolved: Resolved[DistillOptions], source: Source
) -> tuple[nn.Module, ExpertBuffer]:
    """Find and check the experts; a model or zca not given by hand follows what is there."""
    options = resolved.options
    starts = options.starts
    if options.start_epochs is not None and resolved.given_by_hand("max_start_epoch"):
        raise UserError("--start_epochs and --max_start_epoch bound the same: give one of them")
    asked = ExpertKind.of(options)
    shape = {
        "channels": source.channels,
        "num_classes": len(source.class_names),
        "image_size": source.image_size,
    }
    if resolved.given_by_hand("model"):
        network_cost(options.model, **shape)  # refused rather than sent to make experts of it
    found = find_experts(
        options.buffer_path,
        asked,
        model_fixed=resolved.given_by_hand("model"),
        zca_fixed=resolved.given_by_hand("zca"),
    )
    folder = found.folder(options.buffer_path)
    same_network = canonical_name(found.model) == canonical_name(asked.model)
    if found.zca != asked.zca or not same_network:
        print(
            f"only other experts than those of the row (model {asked.model}, zca {asked.zca}) are "
            f"there: using {folder} (model {found.model}, zca {found.zca}); "
            f"for the row's own: {asked.command(options.buffer_path)}"
        )
    if found.zca != asked.zca:
        resolved.set("zca", found.zca, str(folder))
    if not same_network:
        resolved.set("model", found.model, str(folder))
    network = fitting_network(found.model, **shape)
    experts = ExpertBuffer(
        folder,
        [param.shape for param in network.parameters()],
        max_files=options.max_files,
        max_experts=options.max_experts,
        skip_bad=options.skip_bad_buffers,
    )
    last_epoch = starts.end + options.expert_epochs
    if last_epoch > experts.epochs:
        bound = "max_start_epoch" if options.start_epochs is None else "start_epochs to"
        raise UserError(
            f"--{bound} {starts.end} + --expert_epochs {options.expert_epochs} = {last_epoch} is "
            f"beyond the {experts.epochs} epochs of the experts in {folder}; lower one of them or "
            "train longer experts"
        )
    return network, experts


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
        stopping.to_continue("--run_name", run.path.name, *again)
    return run


def look_at(run: RunDir, options: DistillOptions, experts: ExpertBuffer) -> dict[str, Any] | None:
    """The checkpoint of a run that was begun before; UserError where it cannot be continued so."""
    check_writable(run.path)
    checkpoint = run.agreed_checkpoint()
    if checkpoint is None and run.has_steps():
        raise UserError(
            f"{run.path} holds a run without a checkpoint, which cannot be continued: "
            "choose another --run_name"
        )
    if checkpoint is not None:
        check_unchanged(
            checkpoint["config"], fixed_values(options), where=run.path, instead="--run_name"
        )
        before = checkpoint["num_experts"]
        if before != len(experts):
            raise UserError(
                f"{run.path} was begun with {before} experts, now there are {len(experts)} in "
                f"{experts.folder}: pass --max_experts {before} or another --run_name"
            )
    return checkpoint


def say_what_it_takes(
    options: DistillOptions,
    source: Source,
    how: RunPlan,
    experts: ExpertBuffer,
    run: RunDir,
    checkpoint: Mapping[str, Any] | None,
    device: torch.device,
) -> None:
    """Print time, memory and disk, estimated; UserError where there is too little room."""
    iteration = checkpoint["state"]["iteration"] if checkpoint else -1
    evaluated = checkpoint["evaluated"] if checkpoint else -1
    print(
        "estimated:",
        expected_distillation_time(
            options, source, how, device, iteration=iteration, evaluated=evaluated
        ),
    )
    demand = distillation_demand(
        options, source, how, device, experts=experts, run=run, iteration=iteration
    )
    check_room(demand, device, force=options.force)


def make_matcher(
    options: DistillOptions,
    how: RunPlan,
    network: nn.Module,
    experts: ExpertBuffer,
    labels: Tensor,
) -> Matcher:
    execution = Execution.on(labels.device, compiled=how.compiled)
    return Matcher(
        FlatNetwork(
            execution.adapt(network).to(labels.device), dtype=compute_dtype(options.precision)
        ),
        experts,
        labels,
        Sampling(
            syn_steps=options.syn_steps,
            expert_epochs=options.expert_epochs,
            start_epochs=options.starts,
            batch_syn=options.batch_syn,
            dsa_groups=active_groups(
                dsa=options.dsa and not options.no_aug, strategy=options.dsa_strategy
            ),
            seed=options.seed,
        ),
        Objective(
            distance=DISTANCES[options.distance],
            policy=LENGTH_POLICIES[options.length],
            weights=None
            if options.prune_threshold is None
            else prune_dissimilar(options.prune_threshold),
            exact=options.gradient == "exact",
        ),
        unroll=how.unroll,
        trajectories=options.trajectories,
        micro_batch=how.micro_batch,
        execution=execution,
    )


def make_reporter(
    options: DistillOptions,
    how: RunPlan,
    run: RunDir,
    data: ImageDataset,
    labels: Tensor,
    experts: ExpertBuffer,
) -> Reporter:
    config = asdict(options) | {"force": False}  # who uses it with --config decides anew
    run.save_config(
        config,
        experts={**experts.settings, "number": len(experts), "epochs": experts.epochs},
        environment=describe_environment() | {"processes": str(ranks.world())},
    )
    return Reporter(
        run=run,
        log=MetricsLog(run.path, wandb_mode=options.wandb, config=config),
        config=config,
        data=data,
        labels=labels,
        num_experts=len(experts),
        how=asdict(how),
        models=options.evaluation_models,
        select=options.select,
        evaluation=HowToRun(
            at_once=how.eval_at_once,
            execution=Execution.on(labels.device, compiled=how.eval_compiled),
            dtype=compute_dtype(options.precision),
        ),
        protocol=Protocol(
            num_eval=options.num_eval,
            epochs=options.epoch_eval_train,
            batch_size=options.batch_train,
            dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
        ),
    )


def go_on(
    options: DistillOptions,
    checkpoint: Mapping[str, Any] | None,
    state: OuterState,
    matcher: Matcher,
    reporter: Reporter,
) -> int:
    """Begin the run, or go on from its `checkpoint`, to its end; the exit status."""
    if checkpoint is None:
        reporter.begin()
    else:
        reporter.resume(state, checkpoint)
    while True:
        try:
            take_outer_steps(options, state, matcher, reporter)
            break
        except Diverged as reason:
            if options.on_divergence == "rewind" and len(state.rewinds) < MAX_REWINDS:
                reporter.rewind(state, reason)
                continue
            reporter.log_divergence(state, reason)
            reporter.save_last(state)
            after = f" after {len(state.rewinds)} rewinds" if state.rewinds else ""
            print(
                f"distill_att.py: stopped at iteration {state.iteration}{after}: {reason}, under "
                f"another --run_name. The last good set is {reporter.run.distilled('last')}",
                file=sys.stderr,
            )
            return 1
    reporter.save_last(state)
    print(f"done: sets and pictures are in {reporter.run.path}")
    return 0


def take_outer_steps(
    options: DistillOptions, state: OuterState, matcher: Matcher, reporter: Reporter
) -> None:
    """Go on from `state` to the last iteration, leaving behind what is due on the way.

    Raises Diverged where a step cannot be taken, Interrupted behind the step or in the evaluation
    in which a signal came; what was computed is kept.
    """
    seconds: list[float] = []
    with (
        stopping.deferred(),
        progress_bar(total=options.Iteration, initial=state.iteration, unit="it") as progress,
    ):
        while True:
            leave_behind(options, state, reporter)
            if state.iteration >= options.Iteration:
                return
            began = time.monotonic()
            try:
                matching, start_epochs = matcher.match(
                    state.iteration,
                    state.images,
                    state.syn_lr,
                    watched=DISTANCES if due(state.iteration, options.log_distances) else NOTHING,
                )
            except Exception:  # an expert of no use, no memory; what was learned so far is kept
                reporter.save_checkpoint(state)
                raise
            state.step(matching)
            seconds.append(time.monotonic() - began)
            reporter.log_step(state, matching, start_epochs, seconds[-1])
            if len(seconds) == STEPS_TO_JUDGE:
                left = options.Iteration - state.iteration
                reporter.say_time_left(seconds, left, evaluations_left(options, reporter.evaluated))
            progress.set_postfix_str(
                f"loss {matching.loss:.4f} length {max(matching.lengths)} "
                f"syn_lr {state.syn_lr:.3g}",
                refresh=False,
            )
            progress.update()
            if stopping.asked_anyone():
                reporter.save_checkpoint(state)
                ranks.barrier()  # torchrun ends everyone once one has left
                raise stopping.Interrupted


def leave_behind(options: DistillOptions, state: OuterState, reporter: Reporter) -> None:
    """Save, evaluate and keep a checkpoint, as they are due after `state.iteration` steps."""
    at, is_end = state.iteration, state.iteration == options.Iteration
    saves = at == 0 or due(at, options.sets_it)
    evaluates = (
        due(at, options.eval_it) or (is_end and options.eval_it > 0)
    ) and reporter.evaluated < at
    if saves:
        reporter.save(state)
    if evaluates:
        reporter.save_checkpoint(state)  # to come back to if the evaluation is cut off
        with stopping.deferred(False):
            reporter.evaluate(state)
    checkpoints = due(at, options.checkpoint_it) or reporter.is_checkpoint_old()
    if evaluates or saves or is_end or checkpoints:
        reporter.save_checkpoint(state)


def due(at: int, every: int | None) -> bool:
    """Whether what happens every so many iterations, never at 0 or None, does at this one."""
    return every not in (None, 0) and at % every == 0


if __name__ == "__main__":
    sys.exit(run_script(main))
