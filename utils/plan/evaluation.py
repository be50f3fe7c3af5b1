"""What a call of eval.py takes, and which of its flags lower that."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from networks import CROSS_ARCHITECTURE, KIP_NETWORKS
from utils.compute.cohort import images_per_test_batch
from utils.compute.cost import (
    FLOAT_BYTES,
    NetworkCost,
    UnfitError,
    fitting_models,
    inference_bytes,
)
from utils.core.errors import UserError
from utils.data.distilled import SyntheticSet
from utils.data.source import Source
from utils.experts.features import ExpertFeatures
from utils.measure.regression import KernelRegression
from utils.measure.sets import real_images_in_bytes
from utils.measure.squared_error import SquaredErrorSteps
from utils.options import EvalOptions
from utils.plan.choose import TrainingPlan, plan_training
from utils.plan.machine import Machine, halvings
from utils.plan.need import BOTH, add_up, float_words, read_bytes
from utils.plan.room import Demand, Disk, Need
from utils.plan.sizes import DataSize

# Of the features of a class: a copy, what is compared with a point, and the differences.
RULE_COPIES = 3
RECORD_BYTES = 10**6  # eval.json, with the confusions of 100 classes


@dataclass(frozen=True)
class EvalCall:
    """A call that trains networks on `distilled` as its options say, and where these are silent as
    the distillation did.
    """

    options: EvalOptions
    distilled: SyntheticSet
    size: DataSize

    @property
    def models(self) -> Sequence[str]:
        """The networks to train: of those of --eval_mode M the ones that fit the images."""
        if self.options.eval_mode == "M":
            return fitting_models(CROSS_ARCHITECTURE, **self.size.shape)[0]
        return self.options.model or [self.distilled.model]

    @property
    def left_out(self) -> list[str]:
        """What the other networks of --eval_mode M need."""
        if self.options.eval_mode != "M":
            return []
        return fitting_models(CROSS_ARCHITECTURE, **self.size.shape)[1]

    @property
    def regressing(self) -> list[str]:
        """Those of the networks that also regress on the labels of a set for kernel regression."""
        has_labels = KernelRegression.of(self.distilled) is not None
        return [model for model in self.models if has_labels and model in KIP_NETWORKS]

    def check_models(self) -> None:
        """UserError where a network cannot be trained on the images of the set."""
        for model in self.models:
            try:
                self.size.network(model)
            except UnfitError as error:
                raise UserError(
                    f"{error.problem}; {error.needs}: name others by --model, or take --eval_mode "
                    "M, which leaves out what does not fit"
                ) from None

    @property
    def batch_size(self) -> int:
        return self.options.batch_train or self.distilled.config["batch_train"]

    @property
    def dsa_strategy(self) -> str | None:
        """That of the training; None where it is not augmented."""
        config, asked = self.distilled.config, self.options.dsa
        return config["dsa_strategy"] if (config["dsa"] if asked is None else asked) else None

    def plan(
        self, model: str, images: int, epochs: int, machine: Machine, *, batch: int | None = None
    ) -> TrainingPlan:
        """Decide how networks `model` are trained on that number of images, in batches of the
        call's size or of `batch`.
        """
        options = self.options
        return plan_training(
            self.size.training(model, images, batch=batch or self.batch_size, epochs=epochs),
            machine,
            networks=options.num_eval,
            compile=options.compile,
            at_once=options.eval_at_once,
        )

    def demand(
        self, source: Source, machine: Machine, expert_features: ExpertFeatures | None = None
    ) -> Demand:
        """Count what it needs, with real images that the `expert_features` may help to choose."""
        options, size, images = self.options, self.size, len(self.distilled.images)
        wide, normalisation = float_words(options.precision), self.distilled.normalisation
        reading, caches = read_bytes(
            source,
            BOTH if options.needs_train else BOTH[1:],
            zca=normalisation.zca,
            fits=normalisation.needs_fit,
            wide=wide,
        )
        sets = [(images, options.epoch_eval_train)]
        chosen = images if options.selections else 0
        if options.equal_bytes:
            real = min(size.classes * real_images_in_bytes(self.distilled), size.train)
            sets.append((real, options.epoch_eval_train))
            chosen = max(chosen, real)
        if options.full:
            sets.append((size.train, options.epoch_full_train or options.epoch_eval_train))
        plans = [
            self.plan(model, number, epochs, machine.imagined())
            for model in self.models
            for number, epochs in sets
        ]
        steps = SquaredErrorSteps.on(images)
        plans += [
            self.plan(
                model, images, steps.epochs(images), machine.imagined(), batch=steps.batch_size
            )
            for model in self.regressing
        ]
        at_once = max(plan.at_once for plan in plans)
        on_device = images + size.test + size.train * options.needs_train
        # Once more for a checksum, to train, or while others are chosen.
        on_device += 2 * options.num_eval * chosen
        choosing = 0
        if expert_features is not None:
            largest = int(source.labels["train"].bincount().max())
            cost = size.network(self.distilled.model)
            choosing = choosing_bytes(cost, size, features=expert_features.width, largest=largest)
        regression = KernelRegression.of(self.distilled)
        predicting = regression.bytes(self.distilled, size.test) if regression else 0

        def need(
            nproc_per_node: int = machine.processes_here,
            compile: str = "on" if any(plan.compiled for plan in plans) else "off",
            eval_at_once: int = at_once,
        ) -> Need:
            training = max(
                size.cohort_bytes(plan.training, at_once=min(eval_at_once, plan.at_once))
                for plan in plans
            )
            folder = Path(options.distilled).parent
            return add_up(
                machine,
                nproc_per_node,
                compile=compile,
                reading=reading,
                data=wide * size.float_bytes(on_device),
                work=max(wide * training, wide * choosing, predicting),
                kept=size.matrix_bytes * normalisation.zca,
                disk=[Disk(folder, RECORD_BYTES, "a copy of the set on another disk"), *caches],
            )

        gentler: dict[str, Sequence[object]] = {
            "nproc_per_node": machine.fewer_processes,
            "compile": ["off"],
            "eval_at_once": halvings(at_once),
        }
        return Demand(need, gentler)


def choosing_bytes(cost: NetworkCost, size: DataSize, *, features: int, largest: int) -> int:
    """Memory of an expert that describes each training image by `features` numbers, or by logits
    and answers, and of a rule at work on the `largest` class.
    """
    tested = min(size.train, images_per_test_batch(size.image_size))
    looking = 2 * FLOAT_BYTES * cost.parameters + inference_bytes(cost, tested)
    kept = max(features, 2 * size.classes) * size.train
    return FLOAT_BYTES * kept + max(looking, RULE_COPIES * FLOAT_BYTES * features * largest)
