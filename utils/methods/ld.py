r"""LD, label distillation (Bohdal et al., 2020), second order: learn the labels of real images.

    a      = l(theta; inner batch of the set, its labels)
    theta' = theta - lr_inner grad a
    J      = mean over real (x, y) of l(theta'; x, y)

One network trains by Adam on a. When its error on the real batches falls no more, its steps until
then are noted and a fresh one follows. The labels are probabilities, learned by Adam.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.compute.cost import FLOAT_BYTES, GRADIENT_PASSES, NetworkCost
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork
from utils.compute.optimisers import Adam, first_state
from utils.config.fields import option
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import ImageDataset, Split
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work, real_or_noise
from utils.methods.real_loss import RealLoss, fresh_theta
from utils.methods.unroll.engine import Gradients
from utils.methods.unroll.losses import BatchLoss, Found, training_loss
from utils.methods.unroll.options import BatchOptions, LabelOptions, TargetOptions
from utils.methods.unroll.problem import draw_problem
from utils.methods.unroll.students import Students
from utils.methods.unroll.work import count_work

_GROUP = "label distillation (LD)"
FORM = "probabilities"
ADAM = Adam()
NOTED = 3  # the counts whose mean is the steps of networks that train on the set


@dataclass(frozen=True)
class LDOptions(TargetOptions, BatchOptions, LabelOptions):
    lr_inner: float = option(
        0.01, "learning rate of the step that labels are learned through", group=_GROUP, above=0
    )
    lr_adam: float = option(
        1e-3, "learning rate of Adam, which trains the network", group=_GROUP, above=0
    )
    restart_after: int = option(
        50,
        "steps in the moving average of the network's error, and steps without a new minimum of it "
        "before a fresh network follows",
        group=_GROUP,
        minimum=1,
    )


@dataclass(frozen=True)
class Training:
    """How the training of one network goes: its errors so far, whose mean over a window counts.

    `wrong` has the wrong answers of the last steps, `lowest` their smallest sum over a whole
    window, which was reached after `best` steps.
    """

    steps: int = 0
    wrong: tuple[int, ...] = ()
    lowest: float = math.inf
    best: int = 0

    def after(self, wrong: int, window: int) -> "Training":
        """The same one step later."""
        latest, steps = (*self.wrong, wrong)[-window:], self.steps + 1
        if len(latest) == window and sum(latest) < self.lowest:
            return Training(steps, latest, sum(latest), steps)
        return replace(self, steps=steps, wrong=latest)

    def is_over(self, window: int) -> bool:
        """Whether more steps than the window have passed without a new minimum."""
        return self.best > 0 and self.steps - self.best > window


@dataclass(frozen=True)
class Running:
    """Network `number` of a run at work: its parameters with Adam's moments, `state` (1, 3 P), and
    its training; `noted` are the steps of those before it. Tensors are never written to.
    """

    state: Tensor
    number: int = 0
    training: Training = field(default_factory=Training)
    noted: tuple[int, ...] = ()


class LabelDistillation:
    """LD on the training images `train`; `fresh` makes a random network from a seed.

    Several processes divide the inner batches and those of real images.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        train: Split,
        *,
        batch_syn: int | None,
        batch_target: int,
        lr_inner: float,
        lr_adam: float,
        restart_after: int,
        seed: int,
        engine: str = "adjoint",
        execution: Execution = PLAIN,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._fresh = fresh
        self._like = train.images[:0]  # device and type of the parameters
        self._batch_syn = batch_syn
        self._lr_inner = self._like.new_tensor(lr_inner)
        self._lr_adam = self._like.new_tensor(lr_adam)
        self._window = restart_after
        self._seed = seed
        adapted = execution.adapt(fresh(0)).to(self._like.device)
        network = FlatNetwork(adapted, dtype=dtype)
        self._students = Students(
            training_loss(network, FORM),
            engine=engine,
            execution=execution,
            micro_batch=micro_batch,
            by_labels=True,
        )
        self._inner = BatchLoss(network, execution, rows=1, form=FORM)
        self._target = RealLoss.of(
            network, self._students, train, batch=batch_target, seed=seed, execution=execution
        )
        self._running = Running(self._first_state(0))

    @classmethod
    def build(cls, setting: Setting) -> "LabelDistillation":
        """Build the method of a run; its flags are LDOptions."""
        options = setting.options
        assert setting.train is not None
        return cls(
            setting.fresh,
            setting.train,
            batch_syn=options.batch_syn,
            batch_target=options.batch_target,
            lr_inner=options.lr_inner,
            lr_adam=options.lr_adam,
            restart_after=options.restart_after,
            seed=options.seed,
            engine=setting.unroll,
            execution=setting.execution,
            dtype=setting.dtype,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Differentiate the loss behind one step of the network, then train the network on."""
        images, labels = learned["images"], learned["labels"]
        before = self._running
        end, by, g = self._students.attempt(
            lambda: self._differentiate(iteration, images, labels),
            batch=max(self._target.batch, len(images)),
        )
        assert by.labels is not None
        wrong = int(end.wrong)
        self._running = self._after(before, g, wrong)
        return Step(
            loss=end.values.mean(),
            grads={"labels": self._students.mean_over_ranks(by.labels)},
            record={"error": wrong / self._target.batch, "network": before.number},
            shown=f"network {before.number}",
        )

    def state_dict(self) -> dict[str, Any]:
        running = self._running
        return {
            "state": running.state,
            "number": running.number,
            "noted": list(running.noted),
            "training": asdict(running.training),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        training = {**state["training"], "wrong": tuple(state["training"]["wrong"])}
        self._running = Running(
            state["state"].to(self._like),
            state["number"],
            Training(**training),
            tuple(state["noted"]),
        )

    def _differentiate(
        self, iteration: int, images: Tensor, labels: Tensor
    ) -> tuple[Found, Gradients, Tensor]:
        """J, its gradients, and that of a by theta (1, P)."""
        students = self._students
        state = self._running.state
        theta = state[:, : state.shape[1] // ADAM.vectors].clone()  # whole, as the compiler asks
        problem = draw_problem(
            theta,
            None,
            images[0],
            count=len(images),
            syn_steps=1,
            batch_syn=self._batch_syn,
            dsa_groups=None,
            generators=[stream(self._seed, "student", iteration)],
            share=students.share,
        )
        unrolled = students.unroll(images, self._lr_inner, labels, problem)
        end = self._target(unrolled.theta_n, iteration)
        by = unrolled.pull_back(end.slopes)
        (x,), (y,) = problem.batches(images, range(1)), problem.labels(labels)
        (whole,) = problem.batch_sizes
        inner = self._inner.with_slope(theta, x[0], y[0], whole=whole, size=students.micro_batch)
        return end, by, students.sum_over_ranks(inner.slopes)

    def _after(self, running: Running, g: Tensor, wrong: int) -> Running:
        """What runs after a step along g (1, P)."""
        training = running.training.after(wrong, self._window)
        if training.is_over(self._window):
            following = running.number + 1
            noted = (*running.noted, training.best)[-NOTED:]
            return Running(self._first_state(following), following, noted=noted)
        time = self._lr_adam.new_tensor(training.steps)
        state = ADAM.update(running.state, g, self._lr_adam, time)
        return replace(running, state=state, training=training)

    def _first_state(self, number: int) -> Tensor:
        theta = fresh_theta(self._fresh, self._seed, number).to(self._like)
        return first_state(ADAM, theta[None])


def train_steps(state: Mapping[str, Any]) -> int | None:
    """How many steps train a network on the set: the mean of the last counts that were noted; where
    none was, those of the running network; None before the first step.
    """
    noted = state["noted"]
    return sum(noted) // len(noted) if noted else state["training"]["steps"] or None


def as_probabilities(labels: Tensor) -> Tensor:
    """Map labels (N, C) to probabilities: into [0, 1], then by their sum. Zeros become uniform."""
    shares = labels.clamp(0, 1)
    sums = shares.sum(1, keepdim=True)
    return torch.where(sums == 0, 1 / labels.shape[1], shares / sums)


def _initial(options: Any, data: ImageDataset, experts: Any) -> tuple[Tensor, Tensor]:
    """Begin with random real images and uniform labels."""
    images, _ = real_or_noise(options, data, experts)
    return images, images.new_full((len(images), data.num_classes), 1 / data.num_classes)


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    assert soft is not None
    betas = (0.9, 0.999)
    return [Learned("labels", soft, options.lr_y, "lr_y", adam=betas, project=as_probabilities)]


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.pix_init != "real":
        raise UserError(
            f"--pix_init {options.pix_init}: --method ld learns labels of real images: choose real"
        )


def count_ld(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of an outer step: that of `count_work`, and the gradient that trains the
    network. The largest batch is that of real images.
    """
    images = classes * options.ipc
    batch, target = min(options.batch_syn or images, images), options.batch_target
    work = count_work(
        cost,
        images=images,
        batch_syn=options.batch_syn,
        syn_steps=1,
        students=1,
        students_flag="batch_syn",
        processes=processes,
        target=target,
        keeps_train=True,
    )
    moments = 2 * ADAM.vectors * FLOAT_BYTES * cost.parameters  # before and after a step
    return replace(
        work,
        flop=work.flop + GRADIENT_PASSES * batch * cost.flop // processes,
        passes=work.passes + 2,  # of the real batch, of the inner batch once more
        batch=-(-max(batch, target) // processes),
        whole_batch=max(batch, target),
        kept_bytes=work.kept_bytes + moments,
        compiled_layers=2 * work.compiled_layers,
    )


LD = MethodSpec(
    summary="learn the labels of real images",
    options=LDOptions,
    presets={"lr_y": 1e-3, "Iteration": 17_600, "eval_it": 880},
    title=lambda config: "LD",
    build=LabelDistillation.build,
    initial=_initial,
    learned=_learned,
    learns_images=False,
    label_form=lambda options: FORM,
    train_steps=train_steps,
    count_work=count_ld,
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the loss is not finite: lower --lr_adam or --lr_inner",
    check=_check,
)
