"""What a cell of the plan takes on one A100 (time, memory, disk), as the scripts estimate it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from networks import CROSS_ARCHITECTURE, KIP_NETWORKS
from utils.compute.cost import Training, expert_bytes
from utils.data.spec import KNOWN
from utils.measure.squared_error import SquaredErrorSteps
from utils.methods.kip import KernelOptions
from utils.methods.registry import METHODS
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan.choose import plan_training
from utils.plan.distillation import DistillCall, run_bytes
from utils.plan.experts import ExpertsCall
from utils.plan.machine import A100
from utils.plan.need import Time, device_bytes
from utils.plan.sizes import DataSize

ASSUMPTIONS = (
    f"estimates for a GPU as an A100, at half of the rate of an H100: {A100.speed.rate / 1e12:.0f} "
    f"TFLOP/s sustained and {1e3 * A100.speed.step_seconds:.1f} ms a gradient, about half of "
    "that compiled; every student takes all N_S steps"
)
EVALUATED_SETS = 3  # by eval.py: raw, EMA and random


@dataclass(frozen=True)
class Estimate:
    """GPU hours, and gigabytes of 1e9 bytes: the most memory on a GPU, disk for what is kept."""

    hours: float
    memory: float
    disk: float

    @classmethod
    def of(cls, *, seconds: float, memory: int, disk: int) -> "Estimate":
        return cls(seconds / 3600, memory / 1e9, disk / 1e9)

    @classmethod
    def of_all(cls, calls: Sequence["Estimate"]) -> "Estimate":
        """Of calls that follow one another."""
        return cls(
            hours=sum(each.hours for each in calls),
            memory=max(each.memory for each in calls),
            disk=sum(each.disk for each in calls),
        )


def size_of(dataset: str, res: int | None = None) -> DataSize:
    """The images of a data set, as many as it has; ImageNet's are those of a typical subset."""
    spec, facts = KNOWN[dataset].spec, KNOWN[dataset]
    return DataSize(spec.channels, spec.classes, res or spec.side, facts.train, facts.test)


def experts_estimate(options: BufferOptions, *, res: int) -> Estimate:
    """Of training and keeping all experts."""
    size, number = size_of(options.dataset, res), options.num_experts
    call = ExpertsCall.planned(options, size, range(number), A100)
    work = size.cohort_bytes(call.plan.training, at_once=call.plan.at_once)
    return Estimate.of(
        seconds=call.time.total,
        memory=device_bytes(size.float_bytes(size.train + size.test), work),
        disk=number * expert_bytes(call.plan.training.cost, epochs=options.train_epochs),
    )


def row_estimate(distill: DistillOptions, evaluation: EvalOptions, *, res: int) -> Estimate:
    """Of distilling and evaluating the result, raw and EMA, beside random real images."""
    size = size_of(distill.dataset, res)
    time, memory = distillation_estimate(distill, size)
    seconds = time.total
    for training, sets in _evaluation_trainings(distill, evaluation, size):
        plan = plan_training(
            training,
            A100,
            networks=evaluation.num_eval,
            compile=evaluation.compile,
            at_once=evaluation.eval_at_once,
        )
        seconds += sets * A100.training_seconds(
            training,
            networks=evaluation.num_eval,
            at_once=plan.at_once,
            tested=size.test,
            compiled=plan.compiled,
        )
        work = size.cohort_bytes(training, at_once=plan.at_once)
        memory = max(memory, device_bytes(size.float_bytes(size.test), work))
    written, _ = run_bytes(distill, size)
    return Estimate.of(seconds=seconds, memory=memory, disk=written)


def _evaluation_trainings(
    distill: DistillOptions, evaluation: EvalOptions, size: DataSize
) -> Iterator[tuple[Training, int]]:
    """Those of one network on a set of the row, and on how many sets."""
    method, images = METHODS[distill.method], size.classes * distill.ipc
    own = CROSS_ARCHITECTURE if evaluation.eval_mode == "M" else [distill.model]
    for model in evaluation.model or own:
        cost, batch = size.network(model), min(distill.batch_train, images)
        yield Training(cost, images, batch, evaluation.epoch_eval_train), EVALUATED_SETS
        if model in KIP_NETWORKS and issubclass(method.options, KernelOptions):
            steps = SquaredErrorSteps.on(images)
            yield Training(cost, images, steps.batch_size, steps.epochs(images)), len(method.sets)


def distillation_estimate(options: DistillOptions, size: DataSize) -> tuple[Time, int]:
    """Time of distill_att.py alone, and bytes of the GPU's memory."""
    call = DistillCall.planned(options, size, A100)
    kept = size.test + size.train * call.work.keeps_train
    return call.time, device_bytes(size.float_bytes(kept), call.work_bytes)
