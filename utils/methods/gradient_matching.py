r"""DC and DSA, gradient matching (Zhao et al., ICLR 2021; Zhao & Bilen, ICML 2021).

    J = sum over classes c of D(g_c^syn, g_c^real)      g_c = gradient of the mean loss on class c

at the parameters of one network. It begins at random, trains on the synthetic images between outer
steps by SGD and is replaced by a fresh one after some steps. The real images are drawn anew in
every step. With DSA all images of a class, real and synthetic, share one draw; without, this is DC.

No graph through two gradients is kept: with lam_c = dD/dg_c^syn, dJ/dx is d<g_c^syn, lam_c>/dx.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.compute.cost import (
    FLOAT_BYTES,
    GRADIENT_PASSES,
    TRAINING_COPIES,
    NetworkCost,
)
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork
from utils.config.fields import option
from utils.core import ranks
from utils.core.rng import stream
from utils.data.augment import active_groups
from utils.methods.base import Learned, MethodSpec, Setting, Step, Work
from utils.methods.by_class import ByClassOptions, Classes, make_batches, most_classes, targets_of
from utils.methods.gradient_distances import GRADIENT_DISTANCES, GradientDistance
from utils.methods.inner_training import InnerTraining
from utils.methods.real_loss import fresh_theta
from utils.methods.unroll.losses import training_loss
from utils.methods.unroll.options import BatchOptions
from utils.methods.unroll.steps import Pieces, Steps, adjoint_step, gradient_step, itself
from utils.methods.unroll.students import Students
from utils.methods.unroll.work import ADJOINT_COPIES, ADJOINT_PASSES, GRADIENTS_A_STEP

_GROUP = "gradient matching (DC, DSA)"
# Classes whose gradients are computed side by side: the real images of so many fill a GPU.
CLASSES_AT_ONCE = 8
# Parameter vectors of each of them: both gradients, lam and H lam, and what the distance keeps.
CLASS_VECTORS = 8
# Images per class -> outer steps of a network, epochs between two of them: the published ones.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class GradientMatchingOptions(BatchOptions, ByClassOptions):
    outer_loop: int | None = option(
        None,
        "outer steps of one network (default: as published for the nearest --ipc)",
        group=_GROUP,
        minimum=1,
    )
    inner_loop: int | None = option(
        None,
        "epochs that the network trains on the images between two outer steps (default: likewise)",
        group=_GROUP,
        minimum=0,
    )
    dis_metric: str = option(
        "ours",
        "distance of gradients: cosine distances of all rows, squared differences, or one cosine",
        group=_GROUP,
        choices=GRADIENT_DISTANCES,
    )


@dataclass(frozen=True)
class Loops:
    """`outer` steps of a network, `inner` epochs between two of them."""

    outer: int
    inner: int

    @classmethod
    def of(cls, options: Any) -> "Loops":
        """Those that are given; the others as published for the nearest number of images."""
        outer, inner = LOOPS[nearest_ipc(options.ipc)]
        return cls(
            outer if options.outer_loop is None else options.outer_loop,
            inner if options.inner_loop is None else options.inner_loop,
        )


def nearest_ipc(ipc: int) -> int:
    """The published number of images per class nearest to `ipc`, the smaller on a tie."""
    return min(LOOPS, key=lambda published: abs(published - ipc))


@dataclass(frozen=True)
class Running:
    """Network `number` of a run after `position` of its outer steps; theta (1, P) has trained up to
    the last of them, and is never written to.
    """

    theta: Tensor
    number: int = 0
    position: int = 0


class GradientMatching:
    """DC or DSA on the images of `classes`; `fresh` makes a random network from a seed.

    labels (N,) are those of the synthetic images. Between outer steps the network trains on them
    with rate `lr_net`, `batch_syn` a step, augmented by `dsa_groups`. Several processes divide the
    classes, and these batches. Images go in pieces of `micro_batch` (None: all at once): the result
    is the same, but for networks with batch norm.

    Memory: some vectors of parameters of CLASSES_AT_ONCE classes, and a double backward pass on a
    piece of each.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        classes: Classes,
        labels: Tensor,
        loops: Loops,
        *,
        distance: GradientDistance,
        lr_net: float,
        batch_syn: int | None,
        dsa_groups: tuple[str, ...] | None,
        seed: int,
        execution: Execution = PLAIN,
        dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._fresh = fresh
        self._classes = classes
        self._loops = loops
        self._distance = distance
        self._seed = seed
        self._like = classes.train.images[:0]  # device and type of the parameters
        network = FlatNetwork(execution.adapt(fresh(0)).to(self._like.device), dtype=dtype)
        self._shapes = network.shapes
        loss = training_loss(network)
        rows = min(CLASSES_AT_ONCE, len(classes.own))
        self._steps = Steps.of(loss, execution, rows=rows, one_by_one=True)
        self._students = Students(loss, execution=execution, micro_batch=micro_batch)
        self._train = InnerTraining(
            self._students, labels, self._like.new_tensor(lr_net), batch_syn, dsa_groups
        )
        self._running = Running(self._first(0))

    @classmethod
    def build(cls, setting: Setting) -> "GradientMatching":
        """Build the method of a run; its flags are GradientMatchingOptions."""
        options = setting.options
        return cls(
            setting.fresh,
            Classes.of(setting, "dc"),
            setting.labels,
            Loops.of(options),
            distance=GRADIENT_DISTANCES[options.dis_metric],
            lr_net=options.lr_net,
            batch_syn=options.batch_syn,
            dsa_groups=setting.dsa_groups,
            seed=options.seed,
            execution=setting.execution,
            dtype=setting.dtype,
            micro_batch=setting.micro_batch,
        )

    def step(self, iteration: int, learned: Mapping[str, Tensor]) -> Step:
        """Train the network on the images as they are now, then match gradients at it."""
        images, before = learned["images"], self._running

        def work() -> tuple[Tensor, Tensor, Tensor]:
            theta = self._trained(before, iteration, images) if before.position else before.theta
            return theta, *self._match(theta, iteration, images)

        theta, loss, by_images = self._students.attempt(
            work, batch=max(self._classes.batch_real, len(images))
        )
        self._running = self._after(before, theta)
        return Step(
            loss=ranks.sum_over_ranks(loss),
            grads={"images": ranks.sum_over_ranks(by_images)},
            record={"network": before.number},
            shown=f"network {before.number}",
        )

    def state_dict(self) -> dict[str, Any]:
        running = self._running
        return {"theta": running.theta, "number": running.number, "position": running.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        theta = state["theta"].to(self._like)
        self._running = Running(theta, state["number"], state["position"])

    def _first(self, number: int) -> Tensor:
        return fresh_theta(self._fresh, self._seed, number).to(self._like)[None]

    def _after(self, running: Running, theta: Tensor) -> Running:
        """What runs after an outer step at theta."""
        if running.position + 1 == self._loops.outer:
            return Running(self._first(running.number + 1), running.number + 1)
        return Running(theta, running.number, running.position + 1)

    def _trained(self, running: Running, iteration: int, images: Tensor) -> Tensor:
        """theta (1, P) after the epochs that follow an outer step."""
        generator = stream(self._seed, "student", iteration)
        return self._train(running.theta, images, epochs=self._loops.inner, generator=generator)

    def _match(self, theta: Tensor, iteration: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """J of this process's classes at theta (1, P), and dJ/dimages."""
        loss, by_images = images.new_zeros(()), torch.zeros_like(images)
        for labels in self._classes.groups(CLASSES_AT_ONCE):
            drawn = [self._classes.draw(iteration, label) for label in labels]
            real, synthetic = zip(*drawn, strict=True)
            wanted = self._gradient(theta, make_batches(real, self._classes.train.images), labels)
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                seen = make_batches(synthetic, leaf)
            x = seen.detach()
            value, lam = self._slope(self._gradient(theta, x, labels), wanted)
            by_x = self._pull_back(theta, x, labels, lam)
            loss += value
            by_images += torch.autograd.grad(seen, leaf, by_x)[0]
        return loss, by_images

    def _gradient(self, theta: Tensor, x: Tensor, labels: Sequence[int]) -> Tensor:
        """The gradients (K, P) of the mean losses on x (K, B, C, H, W), each of one class."""
        rows = theta.expand(len(x), -1)
        return gradient_step(self._steps, self._pieces(x), rows, x, targets_of(x, labels))

    def _pull_back(self, theta: Tensor, x: Tensor, labels: Sequence[int], lam: Tensor) -> Tensor:
        """d<g, lam>/dx of these gradients g, with lam (K, P)."""
        rows, targets = theta.expand(len(x), -1), targets_of(x, labels)
        return adjoint_step(self._steps, self._pieces(x), rows, x, targets, lam)[2]

    def _pieces(self, x: Tensor) -> Pieces:
        return Pieces(x.shape[1], self._students.micro_batch, itself)

    @torch.enable_grad()
    def _slope(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the distances of gradients (K, P), and its derivative by the found ones."""
        found = found.detach().requires_grad_()
        total = self._distance(found, wanted, self._shapes).sum()
        return total.detach(), torch.autograd.grad(total, found)[0]


def count_work(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of the process with the most classes; UserError where one would have none.

    An outer step has its part of what a network trains in all.
    """
    own, loops = most_classes(classes, processes), Loops.of(options)
    together = min(own, CLASSES_AT_ONCE)
    real, ipc, images = options.batch_real, options.ipc, classes * options.ipc
    batch_syn = min(options.batch_syn or images, images)
    epochs = loops.inner * (loops.outer - 1) / loops.outer
    matching = own * (GRADIENT_PASSES * (real + ipc) + ADJOINT_PASSES * ipc)
    training = GRADIENT_PASSES * epochs * images / processes
    # A gradient on a real image, or the double backward pass on a synthetic one: the larger counts.
    copies = max(TRAINING_COPIES, ADJOINT_COPIES * min(1, ipc / real))
    return Work(
        flop=int((matching + training) * cost.flop),
        passes=int(-(-own // together) * (1 + GRADIENTS_A_STEP) + epochs * -(-images // batch_syn)),
        batch=max(real, ipc, -(-batch_syn // processes)),
        whole_batch=max(real, ipc, batch_syn),
        students=together,
        kept_bytes=(1 + together * CLASS_VECTORS) * FLOAT_BYTES * cost.parameters,
        image_bytes=int(copies * cost.activation_bytes),
        compiled_layers=4 * cost.layers,  # gradients of three kinds of batches, an adjoint of one
        keeps_train=True,
    )


def _title(config: Mapping[str, Any]) -> str:
    augments = config["dsa"] and not config["no_aug"]
    return "DSA" if active_groups(dsa=augments, strategy=config["dsa_strategy"]) else "DC"


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    """Say what the loops are: nothing of them contradicts the rest."""
    loops = Loops.of(options)
    is_open = options.outer_loop is None or options.inner_loop is None
    where = f", as published for --ipc {nearest_ipc(options.ipc)}" if is_open else ""
    trains = f"trains for {loops.inner} epochs between two" if loops.outer > 1 else "never trains"
    print(f"{options.Iteration} outer steps, {loops.outer} of each network, which {trains}{where}")


def _spec(summary: str, **presets: Any) -> MethodSpec:
    return MethodSpec(
        summary=summary,
        options=GradientMatchingOptions,
        presets={"lr_img": 0.1, "batch_syn": 256, "Iteration": 1_000, **presets},
        title=_title,
        build=GradientMatching.build,
        count_work=count_work,
        learned=lambda options, images, soft: [Learned("images", images, options.lr_img, "lr_img")],
        syn_lr=lambda options: options.lr_net,
        if_not_finite="the loss is not finite: lower --lr_img or --lr_net",
        check=_check,
    )


DC = _spec(
    "match the gradients of real and synthetic images in networks that train on these",
    no_aug=True,
    pix_init="noise",
)
DSA = _spec("dc with all images of a class augmented alike")
