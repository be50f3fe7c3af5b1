"""Distil a data set into a few images per class by matching expert trajectories (ATT).

    python distill_att.py --ipc 10 --syn_steps 50

takes its defaults from configs/<dataset>/ipc<ipc>.yaml and its experts from buffer.py. The same
--run_name continues a run that was interrupted.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks import build_network, canonical_name
from utils import distributed
from utils.augment import active_groups
from utils.config import (
    DEFAULT,
    Resolved,
    check_unchanged,
    fixed_values,
    nearest_row,
    resolve,
    run_script,
)
from utils.data import ImageDataset, find_dataset, read_dataset
from utils.device import default_device
from utils.environment import describe_environment
from utils.errors import UserError
from utils.evaluation import HowToRun, Protocol
from utils.execution import Execution
from utils.expert_buffer import ExpertBuffer, ExpertKind, find_experts
from utils.files import check_writable
from utils.flat_params import FlatNetwork
from utils.matching import Matcher, Sampling
from utils.options import DistillOptions
from utils.outer_state import Diverged, OuterState
from utils.precision import compute_dtype, storage_dtype, use_precision
from utils.progress import progress_bar
from utils.reporter import Reporter
from utils.run_dir import MetricsLog, RunDir
from utils.run_plan import RunPlan, plan_run
from utils.sources import Source
from utils.synthetic_set import check_ipc, class_labels, initial_images
from utils.trajectory_length import DISTANCES, LENGTH_POLICIES

CHECKPOINT_SECONDS = 600


def main(argv: Sequence[str]) -> int:
    with distributed.process_group():
        return distil(argv)


def distil(argv: Sequence[str]) -> int:
    resolved = resolve(DistillOptions, argv, description=__doc__ or "", find_yaml=find_yaml)
    options = resolved.options
    device = default_device()
    precision = use_precision(options.precision, device)
    with distributed.main_first():  # it may download
        source = find_dataset(
            options.dataset,
            data_path=options.data_path,
            subset=options.subset,
            res=options.res,
            zca=options.zca,
        )
    check_ipc(options.ipc, source.labels["train"], source.class_names)
    resolved.set("res", source.image_size, resolved.sources["res"])
    resolved.set("precision", precision, resolved.sources["precision"])
    network, experts = open_experts(resolved, source)
    if resolved.options.run_name is None:
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        resolved.set("run_name", distributed.from_main(now), DEFAULT)
    options = resolved.options
    run, checkpoint = open_run(options, len(experts))
    how = plan_run(
        options,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
        device=device,
        recorded=checkpoint["how"] if checkpoint else {},
    )
    distributed.barrier()  # nothing is written before everyone has looked
    print(f"distill_att.py -> {run.path}\n{resolved.table()}")
    print(f"{len(experts)} experts of {experts.epochs} epochs", *experts.skipped, sep="\n")

    with distributed.main_first():  # it fills the cache
        data = read_dataset(source, zca=options.zca)
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
    reporter = make_reporter(options, how, run, data, labels, len(experts))
    if checkpoint is not None:
        reporter.resume(state, checkpoint)
    else:
        reporter.log.keep_up_to(-1)  # of a call that ended before its first checkpoint
        reporter.save(state)
        if options.eval_it > 0:
            reporter.evaluate(state)
        reporter.save_checkpoint(state)
    try:
        take_outer_steps(options, state, matcher, reporter)
    except UserError:  # an expert that cannot be used; what was learned so far is kept
        reporter.save_checkpoint(state)
        raise
    except Diverged as reason:
        reporter.save_last(state)
        print(
            f"distill_att.py: stopped at iteration {state.iteration}: {reason}. "
            f"The last good set is {run.distilled('last')}; begin anew with another --run_name",
            file=sys.stderr,
        )
        return 1
    reporter.save_last(state)
    reporter.save_checkpoint(state)
    print(f"done: sets and pictures are in {run.path}")
    return 0


def find_yaml(given: Mapping[str, Any]) -> Path | None:
    if "config" in given:
        return Path(given["config"])
    dataset = given.get("dataset", DistillOptions.dataset)
    ipc = given.get("ipc", DistillOptions.ipc)
    path = nearest_row(dataset, ipc)
    if path is not None and path.stem != f"ipc{ipc}":
        print(f"{dataset} has no row for ipc {ipc}: taking the nearest, {path}")
    return path


def open_experts(
    resolved: Resolved[DistillOptions], source: Source
) -> tuple[nn.Module, ExpertBuffer]:
    """Find and check the experts; a model or zca not given by hand follows what is there."""
    options = resolved.options
    asked = ExpertKind.of(source, zca=options.zca, model=options.model, data_path=options.data_path)
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
    network = build_network(
        found.model,
        channels=source.channels,
        num_classes=len(source.class_names),
        image_size=source.image_size,
    )
    experts = ExpertBuffer(
        folder,
        [param.shape for param in network.parameters()],
        max_files=options.max_files,
        max_experts=options.max_experts,
        in_memory=options.load_all,
        skip_bad=options.skip_bad_buffers,
    )
    last_epoch = options.max_start_epoch + options.expert_epochs
    if last_epoch > experts.epochs:
        raise UserError(
            f"--max_start_epoch {options.max_start_epoch} + --expert_epochs "
            f"{options.expert_epochs} = {last_epoch} is beyond the {experts.epochs} epochs of the "
            f"experts in {folder}; lower one of them or train longer experts"
        )
    return network, experts


def open_run(options: DistillOptions, num_experts: int) -> tuple[RunDir, dict[str, Any] | None]:
    """The run directory and, where this run was begun before, its checkpoint."""
    run = RunDir.locate(
        options.save_path,
        dataset=options.dataset,
        subset=options.subset,
        model=options.model,
        ipc=options.ipc,
        run_name=options.run_name or "",
    )
    check_writable(run.path)
    checkpoint = run.load_checkpoint()
    if checkpoint is None and run.has_steps():
        raise UserError(
            f"{run.path} holds a run without a checkpoint, which cannot be continued: "
            "choose another --run_name"
        )
    if checkpoint is not None:
        check_unchanged(
            checkpoint["config"], fixed_values(options), where=run.path, instead="--run_name"
        )
        if checkpoint["num_experts"] != num_experts:
            raise UserError(
                f"{run.path} was begun with {checkpoint['num_experts']} experts, now there are "
                f"{num_experts}: pass --max_experts {checkpoint['num_experts']} or another "
                "--run_name"
            )
    return run, checkpoint


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
            max_start_epoch=options.max_start_epoch,
            batch_syn=options.batch_syn,
            dsa_groups=active_groups(
                dsa=options.dsa and not options.no_aug, strategy=options.dsa_strategy
            ),
            seed=options.seed,
        ),
        distance=DISTANCES[options.distance],
        policy=LENGTH_POLICIES[options.length],
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
    num_experts: int,
) -> Reporter:
    config = asdict(options)
    run.save_config(config, describe_environment() | {"processes": str(distributed.world())})
    return Reporter(
        run=run,
        log=MetricsLog(run, wandb_mode=options.wandb, config=config),
        config=config,
        data=data,
        labels=labels,
        num_experts=num_experts,
        how=asdict(how),
        models=options.evaluation_models,
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


def take_outer_steps(
    options: DistillOptions, state: OuterState, matcher: Matcher, reporter: Reporter
) -> None:
    """Go on from `state` to the last iteration. Raises Diverged where a step cannot be taken."""
    save_it = options.eval_it if options.save_it is None else options.save_it
    checkpoint_at = time.monotonic()
    with progress_bar(total=options.Iteration, initial=state.iteration, unit="it") as progress:
        while state.iteration < options.Iteration:
            began = time.monotonic()
            matching, start_epochs = matcher.match(state.iteration, state.images, state.syn_lr)
            state.step(matching)
            reporter.log_step(state, matching, start_epochs, time.monotonic() - began)
            progress.set_postfix_str(
                f"loss {matching.loss:.4f} length {max(matching.lengths)} "
                f"syn_lr {state.syn_lr:.3g}",
                refresh=False,
            )
            progress.update()

            is_end = state.iteration == options.Iteration
            saves = save_it > 0 and state.iteration % save_it == 0
            evaluates = options.eval_it > 0 and (state.iteration % options.eval_it == 0 or is_end)
            if saves:
                reporter.save(state)
            if evaluates:
                reporter.evaluate(state)
            if saves or evaluates or time.monotonic() - checkpoint_at > CHECKPOINT_SECONDS:
                reporter.save_checkpoint(state)
                checkpoint_at = time.monotonic()


if __name__ == "__main__":
    sys.exit(run_script(main))
