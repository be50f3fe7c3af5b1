"""The door for methods: what a method of distillation is to the loop, the recorder, the planner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.compute.execution import Execution
from utils.data.dataset import Split
from utils.experts.buffer import ExpertBuffer


@dataclass(frozen=True)
class Step:
    """The outcome of one outer step, which is one update of what is learned."""

    loss: Tensor  # a scalar
    grads: Mapping[str, Tensor]  # by the name of what is learned: "images", "syn_lr"
    record: Mapping[str, Any]  # plain values for metrics.jsonl, beside the loss
    factor: float = 1.0  # on the rates of this update
    distances: Mapping[str, Any] = field(default_factory=dict)  # a record of its own; may be empty
    shown: str = ""  # beside the loss, in the progress bar


class Method(Protocol):
    """One method at work in one run.

    Every draw follows from (seed, name, iteration), so any iteration can be repeated. What a step
    needs from the past is in `state_dict`: plain values and CPU tensors, {} for most methods.
    """

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Compute outer step `iteration` from what is learned, which is read, never written."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Learned:
    """Something that outer steps update by SGD with momentum: where it starts, and its rate.

    `rate_flag` is the flag that sets the rate, so the one to lower where it diverges. The values
    must stay finite and, where `positive`, above zero.
    """

    name: str
    initial: Tensor
    rate: float
    rate_flag: str
    positive: bool = False


@dataclass(frozen=True)
class Work:
    """What an outer step costs one process, counted before it: plain numbers for the planner.

    `flop` is the arithmetic of a step at its full length, `passes` how many network steps follow
    one another in it (a device has a shortest time for each). A step works on `batch` images at a
    time, which --micro_batch cuts into pieces: it holds `kept_bytes` whatever their size and
    `image_bytes` for each image of a piece. A method that can also keep one graph over the whole
    step (--unroll autograd) says how large it is: `graph_bytes`.
    """

    flop: int
    passes: int
    batch: int
    whole_batch: int  # of all processes together
    kept_bytes: int
    image_bytes: int
    graph_bytes: int | None = None
    compiled_layers: int = 0  # layers of all functions that compiling the step compiles


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


@dataclass(frozen=True)
class MethodSpec:
    """A method as the rest of the house knows it, before a run begins.

    `options` is the dataclass of its own flags, `presets` what differs from their defaults and the
    common ones where neither flag nor YAML says otherwise. `title` names a configuration in tables;
    `check(options)` raises UserError where flags contradict each other.
    """

    summary: str
    options: type
    presets: Mapping[str, Any]
    title: Callable[[Mapping[str, Any]], str]
    build: Callable[[Setting], Method]
    learned: Callable[[Any, Tensor], Sequence[Learned]]  # (options, initial images)
    syn_lr: Callable[[Any], float]  # the rate of networks that train on the set, where not learned
    if_not_finite: str  # what the loss is called then, and which flags to lower
    needs_experts: bool = False
    needs_train: bool = False
    check: Callable[[Any], None] = lambda options: None
