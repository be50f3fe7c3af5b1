r"""BPTT, exact back-propagation through training: no experts, a loss on real images at the end.

    J = mean over real (x, y) of l(theta_n; x, y)        theta_0 a fresh random network

theta_n has taken n steps on the synthetic images. Gradients flow through the last `window` of them,
exactly and in flat memory. With `random_length` n is drawn between the window and N_S, so that all
parts of training are seen: random truncated back-propagation (RaT-BPTT, Feng et al., ICLR 2024).
The gradient of the images is scaled down where it is longer than `clip` times its moving average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.compute.cost import NetworkCost
from utils.compute.optimisers import OPTIMISERS
from utils.config.fields import option
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.methods.base import Learned, MethodSpec, Setting, Work
from utils.methods.real_loss import BackPropagation
from utils.methods.unroll.options import RealLossOptions, StepsOptions
from utils.methods.unroll.problem import Problem, draw_problem
from utils.methods.unroll.work import count_work

_GROUP = "back-propagation through training"


@dataclass(frozen=True)
class BPTTOptions(StepsOptions, RealLossOptions):
    window: int | None = option(
        None,
        "gradients flow through the last so many steps of a student (default: all)",
        group=_GROUP,
        minimum=1,
    )
    random_length: bool = option(
        False, "a student takes a random number of steps, from window to syn_steps", group=_GROUP
    )
    inner_opt: str = option(
        "momentum",
        "how students train: sgd, momentum (0.9) or adam, whose rate is not that of evaluations",
        group=_GROUP,
        choices=OPTIMISERS,
    )
    outer_opt: str = option(
        "adam", "what moves the images and the rate", group=_GROUP, choices=("adam", "sgd")
    )
    clip: float = option(
        2.0,
        "scale a gradient down that is longer than this times its moving average; 0 = never",
        group=_GROUP,
        minimum=0,
    )


@dataclass(frozen=True)
class RandomBatches:
    """N_S, the window of gradients, whether n is drawn; batches are drawn, and augmented."""

    syn_steps: int
    window: int
    random_length: bool
    batch_syn: int | None
    dsa_groups: tuple[str, ...] | None
    seed: int

    def length(self, iteration: int) -> int:
        """n of an outer step."""
        if not self.random_length:
            return self.syn_steps
        generator = stream(self.seed, "bptt", iteration, "length")
        return int(torch.randint(self.window, self.syn_steps + 1, (1,), generator=generator))

    def factor(self, iteration: int) -> float:
        return 1.0

    def problem(
        self,
        theta_0: Tensor,
        images: Tensor,
        length: int,
        *,
        numbers: Sequence[int],
        share: tuple[int, int],
    ) -> Problem:
        return draw_problem(
            theta_0,
            None,
            images[0],
            count=len(images),
            syn_steps=length,
            batch_syn=self.batch_syn,
            dsa_groups=self.dsa_groups,
            generators=[stream(self.seed, "student", number) for number in numbers],
            share=share,
            first=length - min(self.window, length),
        )


def _build(setting: Setting) -> BackPropagation:
    options = setting.options
    course = RandomBatches(
        options.syn_steps,
        options.window or options.syn_steps,
        options.random_length,
        options.batch_syn,
        setting.dsa_groups,
        options.seed,
    )
    return BackPropagation.of(
        setting,
        course,
        rate=rate_name(options),
        inner_opt=options.inner_opt,
        clip=options.clip,
        exact=options.gradient == "exact",
    )


def rate_name(options: Any) -> str:
    """What the students' rate is called: syn_lr where networks that train on the set take it."""
    return "adam_lr" if options.inner_opt == "adam" else "syn_lr"


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    betas = (0.9, 0.999) if options.outer_opt == "adam" else None
    return [
        Learned("images", images, options.lr_img, "lr_img", adam=betas),
        Learned(
            rate_name(options),
            images.new_tensor(options.lr_teacher),
            options.lr_lr,
            "lr_lr",
            positive=True,
            log=options.log_syn_lr,
            adam=betas,
        ),
    ]


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.window is not None and options.window > options.syn_steps:
        raise UserError(
            f"--window {options.window} is longer than the {options.syn_steps} steps of "
            "--syn_steps: choose at most that many"
        )
    if options.random_length and options.window is None:
        raise UserError("--random_length draws lengths from --window on: give --window")


def count_bptt(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of an outer step at its full length; see `count_work`."""
    return count_work(
        cost,
        images=classes * options.ipc,
        batch_syn=options.batch_syn,
        syn_steps=options.syn_steps,
        students=options.students,
        students_flag="students",
        processes=processes,
        window=options.window,
        vectors=OPTIMISERS[options.inner_opt].vectors,
        target=options.batch_target,
        keeps_train=True,
    )


BPTT = MethodSpec(
    summary="back-propagate a loss on real images through training, without experts",
    options=BPTTOptions,
    presets={
        "lr_img": 0.01,
        "lr_lr": 0.01,
        "log_syn_lr": True,
        "lr_teacher": 0.01,
        "syn_steps": 60,
        "Iteration": 2_000,
    },
    title=lambda config: "BPTT + TESLA" if config.get("gradient") == "tesla" else "BPTT",
    build=_build,
    learned=_learned,
    count_work=count_bptt,
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the loss is not finite: lower --lr_img, --lr_teacher or --syn_steps",
    check=_check,
)
