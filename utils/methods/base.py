"""The door for methods: what a method of distillation is to the loop, the recorder, the planner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The outcome of one outer step: one update of what is learned."""

    loss: Tensor  # a scalar
    grads: Mapping[str, Tensor]  # by the name of what is learned: "images", "syn_lr", "labels"
    record: Mapping[str, Any]  # plain values for metrics.jsonl, beside loss and seconds
    factor: float = 1.0  # on the rates of this update
    curves: Mapping[str, Any] = field(default_factory=dict)  # a record of its own, where asked for


class Method(Protocol):
    """One method in one run. A draw follows from (seed, name, iteration), so that any iteration can
    be repeated; what a step needs from the past is in `state_dict`.
    """

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Compute the outer step `iteration` from what is learned, which is read, never written."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Learned:
    """Something that outer steps update: its start, its rate, and the flag that names the rate.

    It must stay finite, and with `positive` above zero: a step that breaks this is not taken.
    """

    name: str
    initial: Tensor
    rate: float
    rate_flag: str  # lr_img, say: what a message advises to lower
    momentum: float = 0.5
    positive: bool = False


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

    @property
    def divides_batches(self) -> bool:
        """Whether the processes divide each batch, not the students."""
        return self.batch < self.whole_batch
