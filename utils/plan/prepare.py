"""Find and check all that a distillation works with, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from utils.compute.contract import check_batches, check_known, check_repeatable
from utils.compute.device import default_device, use_device
from utils.config.resolve import (
    DEFAULT,
    FOUND,
    Resolved,
    check_unchanged,
    fixed_values,
)
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.data.identity import KEY, DataIdentity, identity_of
from utils.data.real_images import check_ipc
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.experts.kind import ExpertKind, NoExperts, open_experts
from utils.methods.registry import (
    DEFAULT_METHOD,
    METHODS,
    check_own_flags,
    check_same_method,
)
from utils.options import DistillOptions
from utils.plan.distillation import DistillCall
from utils.plan.experts import ExpertsToMake
from utils.plan.machine import Machine
from utils.plan.sizes import DataSize, settle_images
from utils.run.directory import RunDir


@dataclass(frozen=True)
class Prepared:
    """What a run works with, and how: all that is found before anything is written."""

    call: DistillCall
    source: Source
    images: DataIdentity
    experts: ExpertBuffer | ExpertsToMake | None  # to be made: a dry run
    run: RunDir
    checkpoint: dict[str, Any] | None


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
    by_experts = options.pix_init == "samples_predicted_correctly"
    if by_experts and not METHODS[options.method].needs_experts:
        raise UserError(
            f"--pix_init {options.pix_init} asks experts, which --method {options.method} has none "
            "of: choose real or noise"
        )


def check_choices(options: DistillOptions, source: Source) -> None:
    """UserError where the images do not suffice for what is asked of them."""
    if options.select == "val" and "val" not in source.labels:
        raise UserError(
            "--select val needs images held out of the training set: pass --val_fraction 0.1, say, "
            "to buffer.py and distill_att.py alike, or choose --select test or last"
            + (", or put images into val/ beside test/" if source.name == "folder" else "")
        )
    if options.pix_init != "noise":
        advice = "choose at most that many, add images, or pass --pix_init noise"
        check_ipc(options.ipc, source.labels["train"], source.class_names, advice=advice)


def check_model(options: DistillOptions, size: DataSize) -> None:
    """UserError where the network of experts and students does not serve as such."""
    check_repeatable(options.model, **size.shape)
    images = size.classes * options.ipc
    batch = min(options.batch_syn or images, images)
    piece = min(options.micro_batch or batch, batch)
    check_batches(options.model, images, batch, "--batch_syn", **size.shape)
    check_batches(options.model, batch, piece, "--micro_batch", **size.shape)
    METHODS[options.method].check_network(options.model, **size.shape)


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
    before = fixed_values(DistillOptions()) | checkpoint["config"]  # earlier ones knew fewer
    check_unchanged(before, fixed_values(options), where=run.path, instead="--run_name")
    images.check_same_as(
        checkpoint.get(KEY),
        ("train", "test", "val"),
        what=f"run {run.path}",
        advice="give the --data_path that it is from, or another --run_name",
    )
    number = checkpoint["num_experts"]
    if isinstance(experts, ExpertBuffer) and number != len(experts):
        raise UserError(
            f"{run.path} was begun with {number} experts, now there are {len(experts)} in "
            f"{experts.folder}: pass --max_experts {number} or another --run_name"
        )
