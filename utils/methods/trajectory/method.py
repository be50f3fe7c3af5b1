"""Trajectory matching as a method: draw expert segments and student batches, unroll, match."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from utils.compute.batches import to_device
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork
from utils.core import ranks
from utils.core.rng import stream
from utils.experts.buffer import ExpertBuffer
from utils.methods.base import Setting, Step
from utils.methods.trajectory.lengths import DISTANCES, LENGTH_POLICIES
from utils.methods.trajectory.matching import (
    Matching,
    Objective,
    Weights,
    match_by_adjoint,
    match_by_autograd,
)
from utils.methods.trajectory.pruning import all_of, drop_shallow, prune_dissimilar
from utils.methods.trajectory.starts import StartEpochs
from utils.methods.unroll.losses import training_loss
from utils.methods.unroll.problem import Problem, draw_problem
from utils.methods.unroll.stop import NOTHING, Distance, LengthPolicy
from utils.methods.unroll.students import Students


@dataclass(frozen=True)
class Sampling:
    """How an outer step's problem is drawn.

    A student step sees all synthetic images or, with `batch_syn` below their number, the next chunk
    of a random permutation.
    """

    syn_steps: int
    expert_epochs: int
    start_epochs: StartEpochs
    batch_syn: int | None
    dsa_groups: tuple[str, ...] | None
    seed: int


class TrajectoryMatching:
    """Match students to expert segments: ATT, and the relatives that choose another Objective.

    labels (N,) are those of the synthetic images. `trajectories` expert segments are matched in one
    outer step. Where there are several processes, they divide the trajectories among them, or, if
    there is one, its inner batches. `engine` is "adjoint" or "autograd". Every `log_distances`
    steps the whole distance curves are part of the outcome; 0 = never.

    The next problem is drawn, read from disk and copied to the device while this one is worked on.
    """

    def __init__(
        self,
        network: FlatNetwork,
        experts: ExpertBuffer,
        labels: Tensor,
        sampling: Sampling,
        objective: Objective,
        *,
        engine: str = "adjoint",
        trajectories: int = 1,
        micro_batch: int | None = None,
        execution: Execution = PLAIN,
        log_distances: int = 0,
        soft_labels: bool = False,
        skip_above: float | None = None,
    ) -> None:
        self.experts = experts
        self._labels = labels
        self._sampling = sampling
        self._log_distances = log_distances
        self._students = Students(
            training_loss(network, "logits" if soft_labels else None),
            count=trajectories,
            engine=engine,
            execution=execution,
            micro_batch=micro_batch,
            by_labels=soft_labels,
        )
        self._skip_above = skip_above
        self._objective = (
            replace(objective, policy=_agreed(objective.policy))
            if self._students.shares_batches
            else objective
        )
        self._background = ThreadPoolExecutor(
            1, "prefetch", torch.cuda.set_device if labels.is_cuda else _nothing, (labels.device,)
        )
        self._ahead: tuple[int, Future[tuple[Problem, list[int]]]] | None = None

    @property
    def micro_batch(self) -> int | None:
        """Images of a piece; None: all of a batch."""
        return self._students.micro_batch

    @classmethod
    def build(cls, setting: Setting) -> "TrajectoryMatching":
        """Build the method of a run; its flags are TrajectoryOptions."""
        options = setting.options
        assert setting.experts is not None
        if options.load_all:
            setting.experts.read_all()
        return cls(
            FlatNetwork(
                setting.execution.adapt(setting.fresh(0)).to(setting.labels.device),
                dtype=setting.dtype,
            ),
            setting.experts,
            setting.labels,
            Sampling(
                syn_steps=options.syn_steps,
                expert_epochs=options.expert_epochs,
                start_epochs=options.starts,
                batch_syn=options.batch_syn,
                dsa_groups=setting.dsa_groups,
                seed=options.seed,
            ),
            Objective(
                distance=DISTANCES[options.distance],
                policy=LENGTH_POLICIES[options.length],
                weights=weights_of(options),
                exact=options.gradient == "exact",
            ),
            engine=setting.unroll,
            trajectories=options.trajectories,
            micro_batch=setting.micro_batch,
            execution=setting.execution,
            log_distances=options.log_distances,
            soft_labels=options.soft_labels,
            skip_above=options.skip_above,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Match in outer step `iteration`; of several trajectories the record holds lists."""
        watches = self._log_distances > 0 and iteration % self._log_distances == 0
        matching, starts = self.match(
            iteration,
            learned["images"],
            learned["syn_lr"],
            learned.get("labels"),
            watched=DISTANCES if watches else NOTHING,
        )

        def each(values: list[Any]) -> Any:
            return values[0] if len(values) == 1 else values

        lengths = {"length": each(matching.lengths), "n_opt": each(matching.nearest)}
        start_epoch = each(starts)
        grads = {"images": matching.grad_images, "syn_lr": matching.grad_syn_lr}
        if matching.grad_labels is not None:
            grads["labels"] = matching.grad_labels
        is_skipped = self._skip_above is not None and matching.loss.item() > self._skip_above
        curves = {name: each(curve.tolist()) for name, curve in matching.curves.items()}
        return Step(
            loss=matching.loss,
            grads=grads,
            is_skipped=is_skipped,
            record={
                **lengths,
                "start_epoch": start_epoch,
                **({"skipped": True} if is_skipped else {}),
            },
            distances={"start_epoch": start_epoch, **lengths, **curves} if curves else {},
            shown=f"length {max(matching.lengths)}",
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def match(
        self,
        iteration: int,
        images: Tensor,
        syn_lr: Tensor,
        soft_labels: Tensor | None = None,
        *,
        watched: Mapping[str, Distance] = NOTHING,
    ) -> tuple[Matching, list[int]]:
        """Match expert segments from images (N, C, H, W), syn_lr and, where they are learned, soft
        labels (N, classes); also their start epochs.

        The distances `watched` are returned as curves beside the one that is matched by. Every draw
        depends on the seed and `iteration` alone.
        """
        problem, starts = self._drawn_ahead(iteration) or self._draw(iteration, images)
        later = self._background.submit(self._draw, iteration + 1, images)
        self._ahead = (iteration + 1, later)
        labels = self._labels if soft_labels is None else soft_labels
        return self._over_ranks(self._match(problem, images, syn_lr, labels, watched), starts)

    def _drawn_ahead(self, iteration: int) -> tuple[Problem, list[int]] | None:
        if self._ahead is None or self._ahead[0] != iteration:
            return None
        try:
            return self._ahead[1].result()
        except torch.OutOfMemoryError:  # it came while others held the memory
            torch.cuda.empty_cache()
            return None

    def _match(
        self,
        problem: Problem,
        images: Tensor,
        syn_lr: Tensor,
        labels: Tensor,
        watched: Mapping[str, Distance],
    ) -> Matching:
        """Match; where the device's memory runs out, again in smaller pieces."""
        students, arguments = self._students, (problem, images, syn_lr, labels)

        def match() -> Matching:
            if students.engine == "autograd":
                return match_by_autograd(
                    *arguments, students.loss, self._objective, watched=watched
                )
            return match_by_adjoint(
                *arguments,
                students.steps,
                self._objective,
                watched=watched,
                micro_batch=students.micro_batch,
                sum_over_ranks=students.sum_over_ranks,
            )

        return students.attempt(match, batch=max(problem.batch_sizes))

    def _over_ranks(self, matching: Matching, starts: list[int]) -> tuple[Matching, list[int]]:
        """The outcome of all processes together."""
        if ranks.world() == 1:
            return matching, starts
        images = self._students.mean_over_ranks(matching.grad_images)
        syn_lr = self._students.mean_over_ranks(matching.grad_syn_lr)
        labels = matching.grad_labels
        labels = None if labels is None else self._students.mean_over_ranks(labels)
        matching = replace(matching, grad_images=images, grad_syn_lr=syn_lr, grad_labels=labels)
        if self._students.shares_batches:
            return replace(matching, loss=ranks.from_main(matching.loss.cpu())), starts
        curves = {name: curve.cpu() for name, curve in matching.curves.items()}
        theirs = ranks.gather((matching.lengths, matching.distances.cpu(), curves, starts))
        return replace(
            matching,
            loss=self._students.mean_over_ranks(matching.loss),
            lengths=[n for lengths, _, _, _ in theirs for n in lengths],
            distances=torch.cat([distances for _, distances, _, _ in theirs]),
            curves={name: torch.cat([part[name] for _, _, part, _ in theirs]) for name in curves},
        ), [start for _, _, _, starts in theirs for start in starts]

    def _draw(self, iteration: int, images: Tensor) -> tuple[Problem, list[int]]:
        """The problem of this process in outer step `iteration`, and the start epochs."""
        numbers = [iteration * self._students.count + own for own in self._students.own]
        segments = [self._draw_segment(number) for number in numbers]
        ends = [
            self.experts.segment(expert, start, self._sampling.expert_epochs)
            for expert, start in segments
        ]
        theta_0, theta_star = (
            to_device(torch.stack(thetas).to(images.dtype), images.device)
            for thetas in zip(*ends, strict=True)
        )
        problem = draw_problem(
            theta_0,
            theta_star,
            images[0],
            count=len(self._labels),
            syn_steps=self._sampling.syn_steps,
            batch_syn=self._sampling.batch_syn,
            dsa_groups=self._sampling.dsa_groups,
            generators=[stream(self._sampling.seed, "student", number) for number in numbers],
            share=self._students.share,
        )
        return problem, [start for _, start in segments]

    def _draw_segment(self, number: int) -> tuple[int, int]:
        """The experts in a new random order on every pass; the start epoch by its schedule."""
        seed = self._sampling.seed
        which_pass, position = divmod(number, len(self.experts))
        order = torch.randperm(
            len(self.experts), generator=stream(seed, "expert_order", which_pass)
        )
        start = self._sampling.start_epochs.draw(
            number // self._students.count, stream(seed, "start_epoch", number)
        )
        return int(order[position]), start


def weights_of(options: Any) -> Weights | None:
    """How much each parameter counts, by the flags."""
    chosen = []
    if options.prune_threshold is not None:
        chosen.append(prune_dissimilar(options.prune_threshold))
    if options.depth_ratio > 0:
        chosen.append(drop_shallow(options.depth_ratio))
    return all_of(chosen)


def _agreed(policy: LengthPolicy) -> LengthPolicy:
    """The main process's choice: on unequal devices another might differ by a rounding."""
    return lambda distances: ranks.from_main(policy(distances))


def _nothing(device: torch.device) -> None:
    pass
