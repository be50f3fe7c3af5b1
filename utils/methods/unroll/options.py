"""The flags of methods that unroll students: of all, of those that learn rates or labels, of those
with random batches, of those with a loss on real images at the end. KIP and LD share some.
"""

from dataclasses import dataclass

from utils.config.fields import option

_SET, _STUDENTS = "synthetic set", "students"
_SPEED = "speed and memory (the same result up to rounding)"


@dataclass(frozen=True)
class UnrollOptions:
    unroll: str = option(
        "auto",
        "constant-memory reverse sweep, or one autograd graph over all steps; same gradient",
        group=_SPEED,
        choices=("auto", "adjoint", "autograd"),
        may_change=True,
    )


@dataclass(frozen=True)
class RateOptions(UnrollOptions):
    lr_lr: float = option(
        1e-5, "learning rate of syn_lr, the students' rate", group=_SET, minimum=0, found=True
    )
    log_syn_lr: bool = option(
        False,
        "let lr_lr move the logarithm of syn_lr, which then stays positive (default: where lr_lr "
        "is found)",
        group=_SET,
        found="lr_lr",
    )
    lr_teacher: float = option(0.01, "initial syn_lr", group=_SET, above=0, found=True)


@dataclass(frozen=True)
class LabelOptions:
    lr_y: float = option(2.0, "learning rate of soft labels", group=_SET, minimum=0)


@dataclass(frozen=True)
class BatchOptions:
    batch_syn: int | None = option(
        None, "synthetic images per student step (default: all)", group=_STUDENTS, minimum=1
    )


@dataclass(frozen=True)
class StepsOptions(RateOptions, BatchOptions):
    syn_steps: int = option(
        50,
        "N_S, the most steps that a student takes",
        group=_STUDENTS,
        minimum=1,
        maximum=100_000,
        found=True,
    )
    gradient: str = option(
        "exact",
        "exact, or TESLA's approximation without the path through later parameters",
        group=_STUDENTS,
        choices=("exact", "tesla"),
    )


@dataclass(frozen=True)
class RealBatchOptions:
    batch_target: int = option(
        1024, "real images in the loss at the end", group=_STUDENTS, minimum=1
    )


@dataclass(frozen=True)
class NetworkRateOptions:
    lr_net: float = option(
        0.01,
        "learning rate of networks that train on the images, where none of theirs is learned",
        group=_STUDENTS,
        above=0,
    )


@dataclass(frozen=True)
class TargetOptions(NetworkRateOptions, RealBatchOptions, UnrollOptions):
    """Those of a loss on real images."""


@dataclass(frozen=True)
class RealLossOptions(RateOptions, TargetOptions):
    students: int = option(
        1, "networks that one outer step averages over", group=_STUDENTS, minimum=1, maximum=10_000
    )
