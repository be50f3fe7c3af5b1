r"""DD, dataset distillation (Wang et al., 2018): T steps with batches and rates of their own.

    theta_{t+1} = theta_t - eta_t grad l(theta_t; batch t mod S)      t = 0 ... S x epochs - 1
    J = mean over real (x, y) of l(theta_T; x, y)                     theta_0 a fresh random network

Batch s has every class ipc / S times, always the same images in the same order, not augmented. All
images and all T rates are learned by Adam. Published with one rate each as softplus of what is
learned; here its logarithm is learned, which is nearly the same for small rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from utils.compute.batches import Draw, steps_per_block
from utils.compute.cost import NetworkCost
from utils.config.fields import option
from utils.core.errors import UserError
from utils.data.distilled import batches_in_order
from utils.methods.base import Learned, MethodSpec, Setting, Work
from utils.methods.real_loss import BackPropagation
from utils.methods.unroll.options import RealLossOptions
from utils.methods.unroll.problem import Problem, StudentBatches
from utils.methods.unroll.work import count_work

_GROUP = "dataset distillation (DD)"
RATES = "step_lrs"


@dataclass(frozen=True)
class DDOptions(RealLossOptions):
    distill_steps: int = option(
        10,
        "batches of the set; the images of a class are divided over them",
        group=_GROUP,
        minimum=1,
    )
    distill_epochs: int = option(
        3, "how often a student goes through the batches", group=_GROUP, minimum=1, maximum=10_000
    )
    halve_every: int = option(
        0, "outer steps between halvings of lr_img and lr_lr; 0 = never", group=_GROUP, minimum=0
    )


@dataclass(frozen=True)
class FixedBatches:
    """`steps` batches of a set of `classes` with `ipc` images each, gone through `epochs` times."""

    classes: int
    ipc: int
    steps: int
    epochs: int
    halve_every: int
    seed: int

    def length(self, iteration: int) -> int:
        return self.steps * self.epochs

    def factor(self, iteration: int) -> float:
        return 0.5 ** (iteration // self.halve_every) if self.halve_every else 1.0

    def problem(
        self,
        theta_0: Tensor,
        images: Tensor,
        length: int,
        *,
        numbers: Sequence[int],
        share: tuple[int, int],
    ) -> Problem:
        batches = batches_in_order(self.classes, self.ipc, self.steps)
        whole = [batches[t % self.steps] for t in range(length)]
        drawn = [[Draw(batch, None).shard(*share) for _ in numbers] for batch in whole]
        per_block = steps_per_block(images[0], len(numbers) * len(whole[0]))
        made = StudentBatches(drawn, per_block, theta_0.device)
        return Problem(
            theta_0=theta_0,
            batches=made,
            labels=made.labels,
            batch_sizes=[len(batch) for batch in whole],
            steps_per_block=per_block,
        )


def _build(setting: Setting) -> BackPropagation:
    options = setting.options
    course = FixedBatches(
        len(setting.labels) // options.ipc,
        options.ipc,
        options.distill_steps,
        options.distill_epochs,
        options.halve_every,
        options.seed,
    )
    return BackPropagation.of(setting, course, rate=RATES, inner_opt="sgd")


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    rates = images.new_full((options.distill_steps * options.distill_epochs,), options.lr_teacher)
    betas = (0.5, 0.999)
    return [
        Learned("images", images, options.lr_img, "lr_img", adam=betas),
        Learned(RATES, rates, options.lr_lr, "lr_lr", positive=True, log=True, adam=betas),
    ]


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.ipc % options.distill_steps:
        raise UserError(
            f"--ipc {options.ipc} cannot be divided into {options.distill_steps} batches of "
            f"--distill_steps: choose a divisor of {options.ipc}"
        )


def count_dd(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of an outer step; see `count_work`."""
    return count_work(
        cost,
        images=classes * options.ipc // options.distill_steps,
        batch_syn=None,
        syn_steps=options.distill_steps * options.distill_epochs,
        students=options.students,
        students_flag="students",
        processes=processes,
        target=options.batch_target,
        keeps_train=True,
    )


DD = MethodSpec(
    summary="learn batches and the rates of the few steps that train a network on them",
    options=DDOptions,
    presets={
        "pix_init": "noise",
        "lr_img": 0.01,
        "lr_lr": 0.01,
        "log_syn_lr": True,
        "lr_teacher": 0.02,
        "Iteration": 19_600,
        "eval_it": 1_960,
        "halve_every": 1_960,
    },
    title=lambda config: "DD",
    build=_build,
    learned=_learned,
    count_work=count_dd,
    syn_lr=lambda options: options.lr_net,
    if_not_finite="the loss is not finite: lower --lr_img, --lr_lr or --lr_teacher",
    check=_check,
)
