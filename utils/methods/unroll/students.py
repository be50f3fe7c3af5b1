"""The students of one process: which they are, and how they go about their steps."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from utils.compute.execution import PLAIN, Execution
from utils.compute.optimisers import PLAIN_SGD, Optimiser
from utils.core import ranks
from utils.core.errors import UserError
from utils.methods.unroll.engine import Unrolled, train, unroll, unroll_by_autograd
from utils.methods.unroll.problem import Problem
from utils.methods.unroll.steps import Loss, Steps, Sum, itself
from utils.methods.unroll.stop import LAST_STEP, Stop

T = TypeVar("T")


class Students:
    """`count` students in all that train by `loss`, whose steps are prepared for the device.

    Several processes divide them, or the inner batches of a single one. `engine` is "adjoint" or
    "autograd". Where memory runs out, pieces of half the size take over.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        count: int = 1,
        engine: str = "adjoint",
        execution: Execution = PLAIN,
        micro_batch: int | None = None,
        by_labels: bool = False,
        optimiser: Optimiser = PLAIN_SGD,
    ) -> None:
        self.loss = loss
        self.count = count
        self.engine = engine
        self.micro_batch = micro_batch
        self._execution = execution
        self._by_labels = by_labels
        self._optimiser = optimiser
        self.shares_batches = ranks.world() > 1 and count == 1
        self.steps = self._prepared()

    @property
    def own(self) -> range:
        """The numbers of those that this process works on."""
        if self.shares_batches:
            return range(1)
        own = self.count // ranks.world()
        return range(ranks.rank() * own, (ranks.rank() + 1) * own)

    @property
    def share(self) -> tuple[int, int]:
        """Which part of each inner batch is this process's: its number, of how many."""
        return (ranks.rank(), ranks.world()) if self.shares_batches else (0, 1)

    @property
    def sum_over_ranks(self) -> Sum:
        """Adds up what the shares of a batch give."""
        return ranks.sum_over_ranks if self.shares_batches else itself

    def mean_over_ranks(self, gradient: Tensor) -> Tensor:
        """The mean over all students, from this process's part of it."""
        if ranks.world() == 1:
            return gradient
        return ranks.sum_over_ranks(gradient) / (1 if self.shares_batches else ranks.world())

    def unroll(
        self,
        images: Tensor,
        rates: Tensor,
        labels: Tensor,
        problem: Problem,
        *,
        stop: Stop = LAST_STEP,
        exact: bool = True,
    ) -> Unrolled:
        """Train them on the images by their engine; see `unroll`."""
        arguments = images.detach(), rates.detach(), labels.detach(), problem
        if self.engine == "autograd":
            return unroll_by_autograd(
                *arguments, self.loss, stop=stop, exact=exact, optimiser=self._optimiser
            )
        return unroll(
            *arguments,
            self.steps,
            stop=stop,
            exact=exact,
            micro_batch=self.micro_batch,
            sum_over_ranks=self.sum_over_ranks,
        )

    def train(self, images: Tensor, rate: Tensor, labels: Tensor, problem: Problem) -> Tensor:
        """Train them on the images, never to go back: theta (K, P) after all steps."""
        return train(
            images,
            rate,
            labels,
            problem,
            self.steps,
            micro_batch=self.micro_batch,
            sum_over_ranks=self.sum_over_ranks,
        )

    def attempt(self, work: Callable[[], T], *, batch: int) -> T:
        """Do `work` on batches of up to `batch` images; where the device's memory runs out, again
        with half the micro-batch.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # handled outside, where nothing of the failed sweep is held any more
            self._halve_micro_batch(batch)

    def _halve_micro_batch(self, batch: int) -> None:
        size = min(self.micro_batch or batch, batch)
        if self.engine == "autograd":
            raise UserError("out of memory: pass --unroll adjoint")
        if size == 1:
            raise UserError("out of memory even at --micro_batch 1: use a device with more memory")
        if ranks.world() > 1:
            raise UserError(f"out of memory: pass --micro_batch {size // 2} or lower")
        self.micro_batch = size // 2
        self.steps = self._prepared()  # lets go of what the old ones hold
        torch.cuda.empty_cache()
        logging.getLogger(__name__).warning(
            "out of memory: going on with --micro_batch %d, the same result in more pieces",
            self.micro_batch,
        )

    def _prepared(self) -> Steps:
        return Steps.of(
            self.loss,
            self._execution,
            rows=len(self.own),
            one_by_one=self.shares_batches,
            by_labels=self._by_labels,
            optimiser=self._optimiser,
        )
