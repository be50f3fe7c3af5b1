"""Train fresh networks on a distilled set and measure them on the real test images.

    python eval.py --distilled results/.../distilled_best.pt --model ConvNetD3 ResNet18

needs that file and the test data, nothing else. (A whitened set of a single iteration also needs
the training data: such sets leave their whitening out.) Sets of other codes are read too, and flags
say what their files do not (docs/data.md). Other flags add real images for comparison: as many as
the set has, chosen by a rule of `utils/measure/selection.py`, or all. The table is kept beside the
file, in eval.json; what is measured already is not measured again.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from networks import elsewhere
from utils.compute.contract import check_head, check_known
from utils.compute.device import (
    compute_dtype,
    default_device,
    storage_dtype,
    use_device,
    use_precision,
)
from utils.compute.execution import Execution
from utils.config.resolve import resolve
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.rng import derive_seed
from utils.core.script import run_script
from utils.data.augment import active_groups
from utils.data.dataset import ImageDataset, find_dataset, needed_splits, read_dataset
from utils.data.distilled import IMPORTED, SyntheticSet
from utils.data.foreign.decide import open_set
from utils.data.identity import PIXELS, DataIdentity, identity_of
from utils.data.label_forms import LABEL_FORMS
from utils.data.real_images import check_ipc
from utils.data.source import Source, SplitName
from utils.experts.features import ExpertFeatures
from utils.experts.kind import ExpertKind
from utils.measure.protocol import (
    Accuracies,
    EvalExecution,
    Measured,
    Protocol,
    evaluate,
    gathered,
)
from utils.measure.record import Entry, EvalRecord, Evaluation
from utils.measure.regression import KernelRegression
from utils.measure.selection import need_experts
from utils.measure.sets import (
    ADAM,
    KERNEL,
    SOFT,
    SQUARED,
    STEPS,
    TrainingSet,
    checksum,
    training_sets,
)
from utils.measure.squared_error import SquaredErrorSteps
from utils.options import DistillOptions, EvalOptions
from utils.plan.evaluation import EvalCall
from utils.plan.machine import Machine
from utils.plan.room import check_room
from utils.plan.sizes import DataSize


def main(argv: Sequence[str]) -> int:
    with ranks.process_group():
        run(parse(argv))
    return 0


def parse(argv: Sequence[str]) -> EvalOptions:
    return resolve(EvalOptions, argv, description=__doc__ or "").options


def run(options: EvalOptions) -> list[Entry]:
    """Measure the set `options.distilled`; returns the evaluations, as eval.json has them."""
    distilled = load(options)
    folder = Path(options.distilled).parent
    check_writable(folder)
    record = EvalRecord(folder)
    measurement = prepare(options, distilled)
    return [] if measurement is None else fill_table(measurement, record)


def load(options: EvalOptions) -> SyntheticSet:
    """Check the flags and read the set `options.distilled`, ours or that of another code."""
    check_flags(options)
    distilled = open_set(
        Path(options.distilled), options.stated(data_path=options.data_path, model=None)
    )
    check_known(options.model or [distilled.model])
    return distilled


def prepare(options: EvalOptions, distilled: SyntheticSet) -> "Measurement | None":
    """Check everything, and read the images; None where that is all that is asked for."""
    device = use_device(options.device)
    options = replace(options, precision=use_precision(options.precision, device))
    if options.random is None:
        options = replace(options, random=distilled.label_form in LABEL_FORMS)
        if options.random:
            print("soft labels: random real images are measured beside them, without --no_random")
    source = find_images(options, distilled)
    images = identify(options, distilled, source)
    needs_experts = need_experts(options.selections)
    expert_features = (
        open_expert_features(options, distilled, source, images) if needs_experts else None
    )
    print(source.describe())
    call, machine = EvalCall(options, distilled, DataSize.of(source)), Machine.here(device)
    call.check_models()
    say_adaptations(call)
    check_room(call.demand(source, machine, expert_features), machine, force=options.force)
    if options.dry_run:
        return None
    data = read_dataset(
        source, normalisation=distilled.normalisation, test_only=not options.needs_train
    )
    data = data.to(device, storage_dtype(options.precision))
    return Measurement(call, data, images, expert_features)


def say_adaptations(call: EvalCall) -> None:
    """Say which networks of --eval_mode M are left out, how others are adapted, or regress."""
    for needs in call.left_out:
        print(f"--eval_mode M: {needs}, the set has {call.size.image_size}: left out")
    for model in call.models:
        if changes := elsewhere.adaptation(model, **call.size.shape):
            print(f"{model} for {call.size.image_size}x{call.size.image_size} pixels: {changes}")
    if call.regressing:
        steps = SquaredErrorSteps.on(len(call.distilled.labels))
        print(f"{', '.join(call.regressing)}{SQUARED}: {steps}")


def check_flags(options: EvalOptions) -> None:
    """UserError where flags are missing or contradict each other."""
    if not options.distilled:
        raise UserError("--distilled is missing: the file distilled_<tag>.pt of a run directory")
    if options.model and options.eval_mode == "M":
        raise UserError("--model and --eval_mode M both say which networks to train: give one")
    if ranks.world() > options.num_eval:
        raise UserError(
            f"{ranks.world()} processes are more than the --num_eval {options.num_eval} "
            "networks: start fewer"
        )


def find_images(options: EvalOptions, distilled: SyntheticSet) -> Source:
    """Find the data set that the set is from, with the splits that are needed."""
    config = distilled.config
    if distilled.normalisation.needs_fit:
        print("fitting ZCA on the training images: the set does not bring its whitening along")
    source = find_dataset(
        distilled.dataset,
        data_path=options.data_path or config["data_path"],
        subset=distilled.subset,
        res=config["res"],
        val_fraction=config.get("val_fraction", 0.0),
        test_fraction=config.get("test_fraction", 0.0),
        fit=config.get("fit", "crop"),
        pixels=None if IMPORTED in config else (distilled.data or {}).get(PIXELS, {}),
        splits=needed_splits(distilled.normalisation, test_only=not options.needs_train),
    )
    check_classes(options, distilled, source.class_names)
    if options.selections:
        flags = " ".join(f"--{name}" for name in options.selections)
        advice = f"leave {flags} out, or measure a set of fewer images a class"
        check_ipc(distilled.ipc, source.labels["train"], source.class_names, advice=advice)
    return source


def check_classes(options: EvalOptions, distilled: SyntheticSet, theirs: tuple[str, ...]) -> None:
    """UserError where the test images are of other classes than the set.

    Names count only for the user's own folders; elsewhere they may come from optional files.
    """
    ours = distilled.class_names
    if len(ours) != len(theirs):
        difference = f"{len(theirs)} classes instead of {len(ours)}"
    elif distilled.dataset == "folder" and ours != theirs:
        then, now = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
        difference = f"class {now} instead of {then}"
    else:
        return
    raise UserError(
        f"set {options.distilled}: the test images of "
        f"{options.data_path or distilled.config['data_path']} are of other classes: {difference}; "
        "give the --data_path that it is from"
    )


def identify(options: EvalOptions, distilled: SyntheticSet, source: Source) -> DataIdentity:
    """Tell the images apart; UserError where the set was made from others."""
    images = identity_of(source, options.data_path or distilled.config["data_path"])
    splits: tuple[SplitName, ...] = ("train",) if options.other_test else ("test", "train")
    advice = "" if options.other_test else ", or pass --other_test to measure on other test images"
    images.check_same_as(
        distilled.data,
        splits,
        what=f"set {options.distilled}",
        advice=f"give the --data_path that it is from{advice}",
    )
    return images


def open_expert_features(
    options: EvalOptions, distilled: SyntheticSet, source: Source, images: DataIdentity
) -> ExpertFeatures:
    """The experts of the kind that the set was distilled from."""
    config = distilled.config
    kind = ExpertKind(
        dataset=source.name,
        subset=source.subset,
        res=source.image_size,
        zca=distilled.normalisation.zca,
        model=distilled.model,
        data_path=options.data_path or config["data_path"],
        flat=config.get("flat", False),
        easy_first=config.get("easy_first", False),
        val_fraction=source.val_fraction,
        fit=config.get("fit", "crop"),
        test_fraction=config.get("test_fraction", 0.0),
    )
    buffer_path = options.buffer_path or config.get("buffer_path", DistillOptions.buffer_path)
    check_head(kind.model, **DataSize.of(source).shape, why="choosing real images by experts")
    return ExpertFeatures.open(
        source, images, kind, buffer_path, most=options.num_eval, skip_bad=options.skip_bad_buffers
    )


@dataclass(frozen=True)
class Measurement:
    """What is measured and how, with the images in memory."""

    call: EvalCall
    data: ImageDataset
    images: DataIdentity
    expert_features: ExpertFeatures | None = None

    def training_sets(self) -> Iterator[TrainingSet]:
        """What networks are trained on, see `training_sets`."""
        options = self.call.options
        return training_sets(
            self.call.distilled,
            self.data,
            self.expert_features,
            regressing=self.call.regressing,
            hard_labels=options.hard_labels,
            selections=options.selections,
            equal_bytes=options.equal_bytes,
            full=options.full,
            networks=options.num_eval,
            seed=options.seed,
            lr_real=options.lr_real,
            epochs=options.epoch_eval_train,
            epochs_full=options.epoch_full_train or options.epoch_eval_train,
        )

    @cached_property
    def has_other_test(self) -> bool:
        """Whether the test images are, or may be, others than those of the distillation."""
        before = self.call.distilled.data
        known = before and DataIdentity.from_dict(before).parts.get("test")
        return self.call.options.other_test and known != self.images.parts["test"]

    @cached_property
    def tested_on(self) -> str:
        """A digest of the test data."""
        return checksum(self.data.test.images, self.data.test.labels)

    def describe(self, training_set: TrainingSet, model: str) -> Evaluation:
        """Everything that one evaluation depends on."""
        options = self.call.options
        settings = {
            "distilled": Path(options.distilled).name,
            "trained_on": training_set.name,
            "tested_on": self.tested_on,
            "model": model,
            "lr": training_set.lr,
            "epochs": training_set.epochs,
            "batch_train": self.call.batch_size,
            "dsa": self.call.dsa_strategy,
            "precision": options.precision,
            "seed": options.seed,
        }
        if self.has_other_test:
            settings["other_test"] = True
        if imported := self.call.distilled.config.get(IMPORTED):
            settings[IMPORTED] = imported
        if source := elsewhere.source_digest(model):
            settings["source"] = source  # of the user's own network, which may change
        data = self.images.to_dict()
        return Evaluation(settings, training_set.digest, self.networks(training_set), data)

    def models(self, training_set: TrainingSet) -> Sequence[str]:
        """The networks that are trained on it, or the kernel that is asked."""
        regression = training_set.regression
        return training_set.models or self.call.models if regression is None else [str(regression)]

    def networks(self, training_set: TrainingSet) -> int:
        """How many are trained; a kernel is one."""
        return self.call.options.num_eval if training_set.regression is None else 1

    def evaluate(
        self,
        training_set: TrainingSet,
        model: str,
        *,
        known: Mapping[int, Measured] = MappingProxyType({}),
        keep: Callable[[Mapping[int, Measured]], object] = lambda measured: None,
        look: Callable[[int, nn.Module], object] = lambda number, network: None,
    ) -> Accuracies:
        """Train those of the networks that are not `known`, see `evaluate`; or ask the kernel."""
        options, strategy = self.call.options, self.call.dsa_strategy
        if len(known) == self.networks(training_set):
            return gathered([known[k] for k in range(len(known))])
        if training_set.regression is not None:
            assert isinstance(training_set.images, Tensor)
            return training_set.regression.evaluate(
                training_set.images, training_set.labels, self.data.test, self.data.num_classes
            )
        protocol = Protocol(
            num_eval=options.num_eval,
            epochs=training_set.epochs,
            batch_size=self.call.batch_size,
            dsa_groups=active_groups(dsa=strategy is not None, strategy=strategy or ""),
        )
        return evaluate(
            training_set.images,
            training_set.labels,
            self.data.test,
            num_classes=self.data.num_classes,
            model=model,
            lr=training_set.lr,
            protocol=protocol,
            seed=derive_seed(options.seed, "draw", 0),
            label_form=training_set.label_form,
            own_training=training_set.own_training,
            run=self.how_to_run(training_set, model),
            known=known,
            keep=keep,
            look=look,
        )

    def how_to_run(self, training_set: TrainingSet, model: str) -> EvalExecution:
        """Choose how networks are trained on so many images."""
        options, device = self.call.options, default_device()
        images, epochs = len(training_set.labels), training_set.epochs
        machine = Machine.here(device).compiling(model, self.call.size.shape)
        plan = self.call.plan(model, images, epochs, machine, batch=training_set.batch_size)
        return EvalExecution(
            at_once=plan.at_once,
            execution=Execution.on(device, compiled=plan.compiled, cuda_graphs=options.cuda_graphs),
            dtype=compute_dtype(options.precision),
        )


def fill_table(measurement: Measurement, record: EvalRecord) -> list[Entry]:
    """Measure each training set by each of the models, print and record it."""
    entries = []
    options, distilled = measurement.call.options, measurement.call.distilled
    print(
        f"{options.distilled}: {distilled.dataset}, ipc {distilled.ipc}, "
        f"iteration {distilled.iteration}"
    )
    width = max(12, *map(len, measurement.call.models))
    more: tuple[tuple[str, object], ...] = (
        (SOFT, distilled.soft_labels),
        (STEPS, distilled.step_lrs),
        (ADAM, distilled.train_steps),
        (KERNEL, KernelRegression.of(distilled)),
        (SQUARED, measurement.call.regressing or None),
    )
    first = 14 + max(0 if values is None else len(name) for name, values in more)
    print(f"{'trained on':{first}} {'model':{width}} {'lr':>8} {'epochs':>6}  test accuracy")
    for training_set in measurement.training_sets():
        for model in measurement.models(training_set):
            evaluation = measurement.describe(training_set, model)
            known = record.networks(evaluation, by_class=options.by_class)
            began = time.monotonic()
            accuracies = measurement.evaluate(
                training_set, model, known=known, keep=partial(record.keep, evaluation)
            )
            seconds = None if known else time.monotonic() - began
            entries.append(record.add(evaluation, accuracies, seconds=seconds))
            print(
                f"{training_set.name:{first}} {model:{width}} {training_set.lr:8.4g} "
                f"{training_set.epochs:6}  {accuracies}{note(len(known), evaluation.num_eval)}"
            )
            if options.by_class:
                print(table_by_class(distilled.class_names, accuracies))
    print(f"recorded in {record.path}")
    return entries


def table_by_class(names: Sequence[str], accuracies: Accuracies) -> str:
    """A line for each class."""
    return "\n".join(
        f"  {name:40} {each or 'no test images'}"
        for name, each in zip(names, accuracies.of_classes, strict=True)
    )


def note(known: int, num_eval: int) -> str:
    """Behind a result, how many of its networks an earlier call has trained."""
    if not known:
        return ""
    return "  (recorded before)" if known == num_eval else f"  ({known} of them recorded before)"


if __name__ == "__main__":
    sys.exit(run_script(main))
