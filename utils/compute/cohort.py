"""Train networks on images that lie on their device, several together, and measure them."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from networks import build_network
from utils.compute.batches import Batches, Draw, alike, draw_batches, steps_per_block
from utils.compute.contract import Abilities, abilities
from utils.compute.execution import PLAIN, Execution, Function
from utils.compute.flat import (
    TrainingNetwork,
    flatten,
    float_buffers,
    unflatten,
    without_batch_counts,
)
from utils.compute.labels import likeliest, training_loss
from utils.compute.optimisers import Adam
from utils.compute.sharpness import Sharpness

CPU = torch.device("cpu")
TEST_PIXELS = 512 * 32 * 32
STATE = ("weights", "velocity", "statistics")

# (theta, statistics, x, y) -> the gradient, (the mean loss, (statistics, number of right answers))
Gradient = Callable[
    [Tensor, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]
]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how one step is taken: everything that a compiled step depends on.

    A step is that of SGD with momentum and weight decay or, where it is given, of `adam`.
    """

    model: str
    channels: int
    num_classes: int
    image_size: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    adam: Adam | None = None
    sharpness: Sharpness | None = None  # None: steps along the plain gradient
    execution: Execution = PLAIN
    dtype: torch.dtype | None = None  # that the network computes in; None: that of the images
    label_form: str | None = None  # of soft labels; None: labels are classes

    def build(self, seed: int) -> nn.Module:
        """A fresh network, on the CPU."""
        return build_network(
            self.model,
            channels=self.channels,
            num_classes=self.num_classes,
            image_size=self.image_size,
            seed=seed,
        )

    @property
    def abilities(self) -> Abilities:
        """What the network can do."""
        return abilities(
            self.model,
            channels=self.channels,
            num_classes=self.num_classes,
            image_size=self.image_size,
        )


@dataclass(frozen=True)
class Progress:
    """Means over the steps of one call, (k,) each, on the device, so that nothing waits for them.

    The accuracy is that on the augmented batches.
    """

    losses: Tensor
    accuracies: Tensor


class Cohort:
    """k networks of one recipe that train together, each exactly as it would alone.

    Between calls of `train` the weights are in `networks`.
    """

    def __init__(
        self, recipe: Recipe, seeds: Sequence[int], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.networks = [
            without_batch_counts(recipe.build(seed)).to(device, dtype) for seed in seeds
        ]
        self._theta = torch.stack([flatten(net.parameters()).detach() for net in self.networks])
        self._velocity = _first_velocity(self._theta, recipe.adam)
        self._statistics = torch.stack(
            [
                flatten([self._theta.new_empty(0), *float_buffers(net).values()])
                for net in self.networks
            ]
        )
        self._recipe, self._device = recipe, device
        self._steps = _training_steps(recipe, len(seeds), device)
        self._at_once = recipe.execution.calls_at_once

    @property
    def _plain_steps(self) -> Function:
        """Steps on batches of a size that hardly comes again: none is compiled for it."""
        plain = replace(self._recipe, execution=PLAIN)
        return _training_steps(plain, len(self.networks), self._device)

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """What each network's training goes on from: copies, on the CPU."""
        stacks = (self._theta, self._velocity, self._statistics)
        return [
            {name: row.to("cpu", copy=True) for name, row in zip(STATE, rows, strict=True)}
            for rows in zip(*stacks, strict=True)
        ]

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Undo `state_dicts`; other keys are ignored."""
        self._theta, self._velocity, self._statistics = (
            torch.stack([state[name] for state in states]).to(self._theta) for name in STATE
        )
        self._return_weights()

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        dsa_groups: tuple[str, ...] | None,
        generators: Sequence[torch.Generator],
        seen: Tensor | None = None,
    ) -> Progress:
        """`epochs` passes by SGD over images (N, C, H, W), or (k, N, C, H, W) with different ones
        for each network, and labels (N,), or (N, classes) of the recipe's form; with `seen` (CPU)
        over those of these numbers alone. Order and augmentation of network j come from
        `generators[j]` (CPU). Every batch gets one draw of DSA from `dsa_groups`, if there are any.
        """
        total, k, offset = len(labels), len(self.networks), 0
        numbers = torch.arange(total) if seen is None else seen
        count, usual = len(numbers), {min(batch_size, total), total % batch_size}
        if images.dim() == 5:
            images, labels = images.flatten(0, 1), torch.cat([labels] * k)
            offset = total
        plans = [
            draw_batches(numbers + j * offset, batch_size, dsa_groups, generator)
            for j, generator in enumerate(generators)
        ]
        steps = epochs * -(-count // batch_size)
        rates = torch.full((steps, k), lr, device=images.device, dtype=images.dtype)
        losses, correct = self.train_on(images, labels, plans, rates=rates, usual=usual)
        return Progress(losses / (epochs * count), correct / (epochs * count))

    def train_on(
        self,
        images: Tensor,
        labels: Tensor,
        plans: Sequence[Iterator[Draw]],
        *,
        rates: Tensor,
        usual: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take steps at the rates (T, k) on images (N, C, H, W) and labels (N, ...), network j on
        the batches of `plans[j]`, which at one step are of one size; steps on batches of other than
        `usual` sizes are not compiled. Returns the sums of losses and of right answers over the
        images seen, (k,) each.
        """
        k, drawn = len(self.networks), zip(*plans, strict=True)
        first = next(drawn)
        plan = itertools.chain([first], drawn)
        per_block = steps_per_block(images[0], k * len(first[0]))
        losses = torch.zeros(k, device=images.device, dtype=images.dtype)
        correct = torch.zeros(k, device=images.device, dtype=torch.int64)
        for of_block in rates.split(per_block):
            batches = Batches(list(itertools.islice(plan, len(of_block))), images.device)
            xs, ys = batches.images(images), batches.labels(labels)
            for chosen in alike([y.shape for y in ys], self._at_once):
                here = slice(chosen.start, chosen.stop)
                is_usual = usual is None or ys[here.start].shape[1] in usual
                step = self._steps if is_usual else self._plain_steps
                self._theta, self._velocity, self._statistics, losses, correct = step(
                    self._theta,
                    self._velocity,
                    self._statistics,
                    losses,
                    correct,
                    of_block[here],
                    *xs[here],
                    *ys[here],
                )
        self._return_weights()
        return losses, correct

    def follow(
        self, images: Tensor, labels: Tensor, batches: Sequence[Tensor], rates: Tensor
    ) -> None:
        """Take a step on each of `batches`, numbers of images (N, C, H, W) and labels (N, ...), at
        the rates (T,); all networks see the same.
        """
        k = len(self.networks)
        losses = torch.zeros(k, device=images.device, dtype=images.dtype)
        correct = torch.zeros(k, device=images.device, dtype=torch.int64)
        for batch, rate in zip(batches, rates.to(losses).unbind(), strict=True):
            chosen = batch.to(images.device)
            self._theta, self._velocity, self._statistics, losses, correct = self._steps(
                self._theta,
                self._velocity,
                self._statistics,
                losses,
                correct,
                rate.expand(1, k).contiguous(),
                torch.stack([images[chosen]] * k),
                torch.stack([labels[chosen]] * k),
            )
        self._return_weights()

    def _return_weights(self) -> None:
        for network, theta, statistics in zip(
            self.networks, self._theta, self._statistics, strict=True
        ):
            params, buffers = list(network.parameters()), [*float_buffers(network).values()]
            for tensor, value in zip(
                [*params, *buffers],
                [
                    *unflatten(theta, [param.shape for param in params]),
                    *unflatten(statistics, [buffer.shape for buffer in buffers]),
                ],
                strict=True,
            ):
                tensor.data = value


@cache
def _training_steps(recipe: Recipe, rows: int, device: torch.device = CPU) -> Function:
    """(theta, velocity, statistics, losses, right answers, T rates, T batches, their labels) -> the
    first five after T steps of SGD, the losses and answers of each image added up; stacks with
    `rows` rows, those of the rates (T, rows). Cached: compiled once a process.
    """
    execution = recipe.execution.where(vectorises=recipe.abilities.vectorises)
    step = _training_step(replace(recipe, execution=execution), rows, device)

    def steps(
        theta: Tensor,
        velocity: Tensor,
        statistics: Tensor,
        losses: Tensor,
        correct: Tensor,
        rates: Tensor,
        *batches: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(batches) // 2
        for lr, x, y in zip(rates, batches[:count], batches[count:], strict=True):
            theta, velocity, statistics, loss, hits = step(theta, velocity, statistics, x, y, lr)
            losses, correct = losses + loss * y.shape[1], correct + hits
        return theta, velocity, statistics, losses, correct

    return recipe.execution.capture(steps)


def _training_step(recipe: Recipe, rows: int, device: torch.device) -> Function:
    """(theta, velocity, statistics, x, y, lr) -> the three of them after one step of SGD, the mean
    loss and the number of right answers before it; stacks with `rows` rows.
    """
    gradient_and_value = _gradient_and_value(recipe, rows, device)

    def prepare(function: Function) -> Function:
        return recipe.execution.in_rows(torch.no_grad()(function), rows)

    def update(
        theta: Tensor, velocity: Tensor, direction: Tensor, lr: Tensor
    ) -> tuple[Tensor, Tensor]:
        if recipe.adam is not None:
            return _adam_step(recipe.adam, theta, velocity, direction, lr)
        velocity = recipe.momentum * velocity + direction + recipe.weight_decay * theta
        return theta - lr * velocity, velocity

    def step(
        theta: Tensor, velocity: Tensor, statistics: Tensor, x: Tensor, y: Tensor, lr: Tensor
    ) -> tuple[Tensor, ...]:
        g, (value, (statistics, hits)) = gradient_and_value(theta, statistics, x, y)
        return *update(theta, velocity, g, lr), statistics, value, hits

    if recipe.sharpness is None:
        return prepare(step)
    return _flat_step(recipe.sharpness, gradient_and_value, update, prepare)


def _first_velocity(theta: Tensor, adam: Adam | None) -> Tensor:
    """What k networks remember of no step: (k, P), of Adam the moments and the number of steps."""
    k, size = theta.shape
    return theta.new_zeros(k, size if adam is None else (adam.vectors - 1) * size + 1)


def _adam_step(
    adam: Adam, theta: Tensor, velocity: Tensor, g: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor]:
    time = velocity[-1:] + 1
    state = adam.update(torch.cat([theta, velocity[:-1]])[None], g[None], lr, time)[0]
    return state[: len(theta)], torch.cat([state[len(theta) :], time])


def _gradient_and_value(recipe: Recipe, rows: int, device: torch.device) -> Gradient:
    template = recipe.execution.adapt(recipe.build(seed=0)).to(device)
    network = TrainingNetwork(template, dtype=recipe.dtype)

    def loss(
        theta: Tensor, statistics: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, statistics = network(theta, statistics, x)
        hits = (logits.argmax(1) == likeliest(y, recipe.label_form)).sum()
        return training_loss(logits, y, recipe.label_form), (statistics, hits)

    @torch.enable_grad()
    def by_autograd(
        theta: Tensor, statistics: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]:
        theta = theta.detach().requires_grad_()
        value, (statistics, hits) = loss(theta, statistics, x, y)
        (g,) = torch.autograd.grad(value, theta)
        return g, (value.detach(), (statistics.detach(), hits))

    by_func = torch.func.grad_and_value(loss, has_aux=True)
    return by_autograd if recipe.execution.is_plain(rows) else by_func


def _flat_step(
    sharpness: Sharpness,
    gradient_and_value: Gradient,
    update: Function,
    prepare: Callable[[Function], Function],
) -> Function:
    """The step in two halves, since the compiler takes parameters that are given to it, but not
    all that it has computed itself.
    """

    def look(theta: Tensor, statistics: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        g, (value, (after, hits)) = gradient_and_value(theta, statistics, x, y)
        return sharpness.beside(theta, g), g, after, value, hits

    def go(
        theta: Tensor, velocity: Tensor, lr: Tensor, g: Tensor, beside: Tensor, *batch: Tensor
    ) -> tuple[Tensor, ...]:
        g_s, _ = gradient_and_value(beside, *batch)
        return update(theta, velocity, sharpness.direction(g, g_s), lr)

    first, second = prepare(look), prepare(go)

    def step(
        theta: Tensor, velocity: Tensor, statistics: Tensor, x: Tensor, y: Tensor, lr: Tensor
    ) -> tuple[Tensor, ...]:
        beside, g, after, value, hits = first(theta, statistics, x, y)
        moved = second(theta, velocity, lr, g, beside, statistics, x, y)
        return *moved, after, value, hits

    return step


def images_per_test_batch(image_size: int) -> int:
    """How many test images of that side are measured at a time: 512 of CIFAR's."""
    return max(1, TEST_PIXELS // image_size**2)


def accuracy(
    network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int | None = None
) -> float:
    """The fraction of images (N, C, H, W) that `network` gives their label (N,), in eval mode."""
    given = answers(network, images, batch_size=batch_size)
    return (given == labels).sum().item() / len(images)


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """What `network` says of images (N, C, H, W), in eval mode: (N, classes)."""
    network.eval()
    size = batch_size or images_per_test_batch(images.shape[-1])
    return torch.cat([network(x) for x in images.split(size)])


def answers(network: nn.Module, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """The labels (N,) that `network` gives to images (N, C, H, W), in eval mode."""
    return outputs(network, images, batch_size=batch_size).argmax(1)
