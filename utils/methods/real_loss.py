r"""Methods that back-propagate a loss on real images through the training of fresh networks.

    J = mean over real (x, y) of l(theta_n; x, y)        theta_0 a fresh random network

theta_n has taken n steps on the synthetic images; a Course says which.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.compute.optimisers import OPTIMISERS
from utils.core.rng import derive_seed, stream
from utils.data.dataset import Split
from utils.methods.base import Setting, Step
from utils.methods.unroll.losses import BatchLoss, Found, training_loss
from utils.methods.unroll.problem import Problem
from utils.methods.unroll.students import Students

NORM_DECAY = 0.9  # of the moving average of the gradient's length


class Course(Protocol):
    """How students train."""

    @property
    def seed(self) -> int: ...

    def length(self, iteration: int) -> int:
        """n of an outer step."""
        ...

    def factor(self, iteration: int) -> float:
        """What the outer rates are multiplied with."""
        ...

    def problem(
        self,
        theta_0: Tensor,
        images: Tensor,
        length: int,
        *,
        numbers: Sequence[int],
        share: tuple[int, int],
    ) -> Problem:
        """The steps of the students `numbers` from theta_0 (K, P) on images (N, C, H, W)."""
        ...


@dataclass(frozen=True)
class RealLoss:
    """The loss of `students` on a batch of real images, another one in every outer step.

    Processes that share the students' batches share this one, too.
    """

    loss: BatchLoss
    students: Students
    train: Split
    batch: int
    seed: int

    @classmethod
    def of(
        cls,
        network: FlatNetwork,
        students: Students,
        train: Split,
        *,
        batch: int,
        seed: int,
        execution: Execution,
    ) -> Self:
        """That of `batch` images, or of all where there are fewer."""
        loss = BatchLoss(network, execution, rows=len(students.own))
        return cls(loss, students, train, min(batch, len(train.labels)), seed)

    def __call__(self, theta: Tensor, iteration: int) -> Found:
        """Measure theta (K, P) in an outer step."""
        x, y = self.draw(iteration)
        found = self.loss.with_slope(theta, x, y, whole=self.batch, size=self.students.micro_batch)
        return Found(*map(self.students.sum_over_ranks, found))

    def draw(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Different real images, of which this process has its share."""
        generator = stream(self.seed, "bptt", iteration, "target")
        chosen = torch.randperm(len(self.train.labels), generator=generator)[: self.batch]
        rank, world = self.students.share
        own = chosen[rank * len(chosen) // world : (rank + 1) * len(chosen) // world]
        own = own.to(self.train.images.device)
        return self.train.images[own], self.train.labels[own]


def fresh_theta(fresh: Callable[[int], nn.Module], seed: int, number: int) -> Tensor:
    """The parameters (P,) of random network `number` of a run, on the CPU."""
    network = fresh(derive_seed(seed, "bptt", number, "init"))
    return flatten(network.parameters()).detach()


class BackPropagation:
    """BPTT on the training images `train`; `fresh` makes a random network from a seed.

    `rate` names what is learned as the rate of the students. labels (N,) are those of the synthetic
    images. See `unroll` for `exact`.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        train: Split,
        labels: Tensor,
        course: Course,
        *,
        rate: str,
        inner_opt: str,
        students: int,
        batch_target: int,
        clip: float,
        exact: bool = True,
        engine: str = "adjoint",
        execution: Execution = PLAIN,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._fresh = fresh
        self._labels = labels
        self._course = course
        self._rate = rate
        self._clip = clip
        self._exact = exact
        self._norm: float | None = None  # moving average of the length of the images' gradient
        network = FlatNetwork(execution.adapt(fresh(0)).to(labels.device), dtype=dtype)
        self._students = Students(
            training_loss(network),
            count=students,
            engine=engine,
            execution=execution,
            micro_batch=micro_batch,
            optimiser=OPTIMISERS[inner_opt],
        )
        self._target = RealLoss.of(
            network,
            self._students,
            train,
            batch=batch_target,
            seed=course.seed,
            execution=execution,
        )

    @classmethod
    def of(
        cls,
        setting: Setting,
        course: Course,
        *,
        rate: str,
        inner_opt: str,
        clip: float = 0.0,
        exact: bool = True,
    ) -> Self:
        """Build it for a run whose flags are RealLossOptions."""
        assert setting.train is not None
        return cls(
            setting.fresh,
            setting.train,
            setting.labels,
            course,
            rate=rate,
            inner_opt=inner_opt,
            students=setting.options.students,
            batch_target=setting.options.batch_target,
            clip=clip,
            exact=exact,
            engine=setting.unroll,
            execution=setting.execution,
            dtype=setting.dtype,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Train students from random networks, and differentiate their loss on real images."""
        images, rate = learned["images"], learned[self._rate]
        length = self._course.length(iteration)
        batch = max(self._target.batch, len(self._labels))
        loss, by_images, by_rate = self._students.attempt(
            lambda: self._differentiate(iteration, length, images, rate), batch=batch
        )
        scale = self._clipping(by_images.norm().item())
        return Step(
            loss=loss,
            grads={"images": by_images * scale, self._rate: by_rate * scale},
            record={"length": length, "clipped": scale < 1},
            factor=self._course.factor(iteration),
            shown=f"length {length}",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"norm": self._norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norm = state["norm"]

    def _differentiate(
        self, iteration: int, length: int, images: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """J, dJ/dimages and dJ/drate, means over all students."""
        course, students = self._course, self._students
        numbers = [iteration * students.count + own for own in students.own]
        problem = course.problem(
            torch.stack([self._theta_0(number) for number in numbers]).to(images),
            images,
            length,
            numbers=numbers,
            share=students.share,
        )
        unrolled = students.unroll(images, rate, self._labels, problem, exact=self._exact)
        end = self._target(unrolled.theta_n, iteration)
        by = unrolled.pull_back(end.slopes / len(end.values))
        loss = end.values.mean()
        return (
            loss if students.shares_batches else students.mean_over_ranks(loss),
            students.mean_over_ranks(by.images),
            students.mean_over_ranks(by.rates),
        )

    def _theta_0(self, number: int) -> Tensor:
        return fresh_theta(self._fresh, self._course.seed, number)

    def _clipping(self, norm: float) -> float:
        """What a gradient of that length is multiplied with; its length enters the average."""
        if not (0 < norm < float("inf")):
            return 1.0
        scale = 1.0
        if self._clip and self._norm is not None:
            scale = min(1.0, self._clip * self._norm / norm)
        before = norm if self._norm is None else self._norm
        self._norm = NORM_DECAY * before + (1 - NORM_DECAY) * scale * norm
        return scale
