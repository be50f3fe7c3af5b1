"""The door for methods: what a method of distillation is to the loop, the recorder, the planner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from networks import build_network
from utils.compute.contract import abilities
from utils.compute.device import compute_dtype
from utils.compute.execution import Execution
from utils.data.augment import active_groups
from utils.data.dataset import ImageDataset, Split
from utils.data.real_images import initial_images
from utils.experts.buffer import ExpertBuffer


@dataclass(frozen=True)
class Step:
    """The outcome of one outer step, which is one update of what is learned."""

    loss: Tensor  # a scalar
    grads: Mapping[str, Tensor]  # by the name of what is learned: "images", "syn_lr"
    record: Mapping[str, Any]  # plain values for metrics.jsonl, beside the loss
    factor: float = 1.0  # on the rates of this update
    is_skipped: bool = False  # nothing is updated
    distances: Mapping[str, Any] = field(default_factory=dict)  # a record of its own; may be empty
    shown: str = ""  # beside the loss, in the progress bar


class Method(Protocol):
    """One method at work in one run.

    Every draw follows from (seed, name, iteration), so any iteration can be repeated. What a step
    needs from the past is in `state_dict`: plain values and tensors that later steps do not write
    to, {} for most methods.
    """

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Compute outer step `iteration` from what is learned, which is read, never written."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Trajectories(Protocol):
    """What is asked of experts before they are read: how long they are, and where they lie."""

    @property
    def epochs(self) -> int: ...

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Learned:
    """Something that outer steps update: where it starts, and its rate.

    `rate_flag` is the flag that sets the rate, so the one to lower where it diverges. The values
    must stay finite and, where `positive`, above zero. With `log` it is the logarithm that SGD
    changes, so that they stay positive. A gradient by which a step would move further than `bound`,
    as a root mean square, is scaled down to that. `start` names the flag of the initial value and
    one that is known to work. The step is that of SGD with `momentum` or, for all that a method
    learns, of Adam. What it leaves is mapped by `project` to allowed values.
    """

    name: str
    initial: Tensor
    rate: float
    rate_flag: str
    positive: bool = False
    log: bool = False
    bound: float | None = None
    start: tuple[str, float] | None = None
    momentum: float = 0.5  # as in the field
    adam: tuple[float, float] | None = None  # its betas
    project: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Work:
    """What an outer step costs one process, counted before it: plain numbers for the planner.

    FLOP and bytes are those of float32. A step trains or asks `students` networks side by side,
    which a GPU computes together and a CPU one after another, each on `batch` images at a time;
    --micro_batch cuts these into pieces.

    Attributes:
        flop: arithmetic of a step at its full length.
        passes: gradients that follow one another in it: a device has a shortest time for each.
        batch, whole_batch: images at a time, of this process and of all processes together.
        students: networks side by side.
        kept_bytes: memory whatever the size of a piece.
        image_bytes: memory for each image of a piece, of one student.
        compiled_layers: layers of all functions that compiling the step compiles.
        graph_bytes: memory of one graph over the whole step, for all students, where the method can
            keep one (--unroll autograd).
        keeps_train: whether the real training images stay on the device.
        train_flop: arithmetic for each training image, where a step sees all of them.
    """

    flop: int
    passes: int
    batch: int
    whole_batch: int
    students: int
    kept_bytes: int
    image_bytes: int
    compiled_layers: int
    graph_bytes: int | None = None
    keeps_train: bool = False
    train_flop: int = 0

    @property
    def divides_batches(self) -> bool:
        """Whether the processes divide each batch, not the students."""
        return self.batch < self.whole_batch


@dataclass(frozen=True)
class Setting:
    """What a method works with. `options` are those of the run, its own flags among them."""

    options: Any
    fresh: Callable[[int], nn.Module]  # a random network of the run's model from a seed, on the CPU
    labels: Tensor  # of the synthetic images, (N,), on the device
    experts: ExpertBuffer | None  # where the method needs them
    train: Split | None  # likewise, on the device
    dsa_groups: tuple[str, ...] | None  # None: the method's networks see images as they are
    execution: Execution
    dtype: torch.dtype | None  # that networks compute in; None: that of the images
    unroll: str  # "adjoint" or "autograd"
    micro_batch: int | None

    @classmethod
    def of(
        cls,
        options: Any,
        data: ImageDataset,
        labels: Tensor,
        experts: ExpertBuffer | None,
        plan: Any,
    ) -> "Setting":
        """That of a run with `options` on `data`, whose RunPlan is `plan`."""
        augments = options.dsa and not options.no_aug
        return cls(
            options=options,
            fresh=partial(
                _network, options.model, data.channels, data.num_classes, data.image_size
            ),
            labels=labels,
            experts=experts,
            train=data.train,
            dsa_groups=active_groups(dsa=augments, strategy=options.dsa_strategy),
            execution=Execution.on(
                labels.device, compiled=plan.compiled, cuda_graphs=options.cuda_graphs
            ).where(
                vectorises=abilities(
                    options.model,
                    channels=data.channels,
                    num_classes=data.num_classes,
                    image_size=data.image_size,
                ).vectorises
            ),
            dtype=compute_dtype(options.precision),
            unroll=plan.unroll,
            micro_batch=plan.micro_batch,
        )


def _network(model: str, channels: int, num_classes: int, image_size: int, seed: int) -> nn.Module:
    return build_network(
        model, channels=channels, num_classes=num_classes, image_size=image_size, seed=seed
    )


def real_or_noise(options: Any, data: ImageDataset, experts: Any) -> tuple[Tensor, None]:
    """Begin with random real images or noise, and no soft labels."""
    return initial_images(data, options.ipc, options.pix_init, options.seed), None


@dataclass(frozen=True)
class MethodSpec:
    """A method as the rest of the house knows it, before a run begins.

    `options` is the dataclass of its own flags, `presets` what differs from their defaults and the
    common ones where neither flag nor YAML says otherwise. `title` names a configuration in tables;
    `check(options, by_hand)` raises UserError where flags contradict each other; by_hand(name) says
    whether a flag was given. `check_experts(options, experts)` does where these do not serve.
    """

    summary: str
    options: type
    presets: Mapping[str, Any]
    title: Callable[[Mapping[str, Any]], str]
    build: Callable[[Setting], Method]
    # (options, initial images, initial soft labels or None)
    learned: Callable[[Any, Tensor, Tensor | None], Sequence[Learned]]
    # (options, cost of its network, processes, *, classes) -> what one of the processes does
    count_work: Callable[..., Work]
    syn_lr: Callable[[Any], float]  # the rate of networks that train on the set, where not learned
    if_not_finite: str  # what the loss is called then, and which flags to lower
    needs_experts: bool = False
    learns_images: bool = True  # False: they stay what a run begins with
    # (options, data, experts) -> the images that a run begins with, and their soft labels, if any
    initial: Callable[[Any, ImageDataset, Any], tuple[Tensor, Tensor | None]] = real_or_noise
    # What soft labels are: a key of LABEL_FORMS, which networks train on, or CENTRED, for
    # regression; None: labels are classes
    label_form: Callable[[Any], str | None] = lambda options: None
    # (model, **shape of its images) -> UserError where the network lacks what the method asks of it
    check_network: Callable[..., None] = lambda model, **shape: None
    # From the method's state: how many steps train a network on the set, where the method says so
    train_steps: Callable[[Mapping[str, Any]], int | None] = lambda state: None
    # What is found where nobody gives it; is_open(name) says so of a flag. Before the run from
    # (options, *, epochs, steps_an_epoch, is_open), of the experts; when it begins from (options,
    # method, initial images, *, is_open).
    find_lengths: Callable[..., Mapping[str, int]] = lambda options, **experts: {}
    find_rates: Callable[..., Mapping[str, Any]] = lambda *arguments, is_open: {}
    # (losses, records) of many steps in a row -> what is wrong with them, and what to do.
    stalled: Callable[[Sequence[float], Sequence[Mapping[str, Any]]], str | None] = (
        lambda losses, records: None
    )
    check: Callable[[Any, Callable[[str], bool]], None] = lambda options, by_hand: None
    check_experts: Callable[[Any, Trajectories], None] = lambda options, experts: None

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that a run keeps: raw and, where images are learned, their moving average."""
        return ("raw", "ema") if self.learns_images else ("raw",)
