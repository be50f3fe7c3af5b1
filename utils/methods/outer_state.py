"""What outer steps change: whatever a method learns, its momenta, the images' moving average."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.methods.base import Learned, Step

# Small and large steps: by this part of the value or, of images, of their standard deviation.
SMALL_STEP, LARGE_STEP = 0.02, 0.5


class Diverged(Exception):
    """An outer step that cannot be taken; the message says why and which settings to lower.

    `rate` is the one of them that the outer step itself uses: lr_img or lr_lr, say.
    """

    def __init__(self, reason: str, *, rate: str) -> None:
        super().__init__(reason)
        self.rate = rate


class OuterState:
    """What is learned, by name, and the images (N, C, H, W), where they are not: "images" first.

    `iteration` counts the steps taken. `rewinds` are the times that the run went back after it had
    diverged, oldest first; each has halved one of the rates. `ema_images` is the exponential moving
    average of the images, which starts at the initial ones; after every step
    ema_images <- ema_decay * ema_images + (1 - ema_decay) * images. `syn_lr` is the rate of
    networks that train on the images: what was learned, or the given one. `if_not_finite` says what
    to lower where the loss is not finite. Images that are not learned are given as `images`.
    """

    def __init__(
        self,
        learned: Sequence[Learned],
        *,
        images: Tensor | None = None,
        syn_lr: float,
        ema_decay: float,
        if_not_finite: str,
    ) -> None:
        self.iteration = 0
        self.learned = {} if images is None else {"images": images.clone()}
        self.learned |= {each.name: each.initial.clone() for each in learned}
        self.ema_images = self.images.clone()
        self.rewinds: list[dict[str, Any]] = []
        self._specs = list(learned)
        self._given_syn_lr = syn_lr
        self._ema_decay = ema_decay
        self._if_not_finite = if_not_finite
        self._moves: dict[str, Tensor] = {}  # how far the last step moved each, relatively
        # What SGD changes: the values, or of a logarithm how far a step moves it.
        self._moved = [
            torch.zeros_like(each.initial) if each.log else self.learned[each.name]
            for each in learned
        ]
        self._optimizer = _optimizer(learned, self._moved)

    @property
    def images(self) -> Tensor:
        return self.learned["images"]

    @property
    def soft_labels(self) -> Tensor | None:
        """(N, classes), where they are learned."""
        return self.learned.get("labels")

    @property
    def syn_lr(self) -> float:
        return self.learned["syn_lr"].item() if "syn_lr" in self.learned else self._given_syn_lr

    def update(self, step: Step) -> None:
        """Update from the gradients of `step`. Raises Diverged, leaving all as it was."""
        if step.is_skipped:
            self.iteration += 1
            return
        if not step.loss.isfinite():
            raise self._diverged(self._if_not_finite)
        before = {name: value.clone() for name, value in self.learned.items()}
        groups, rates = self._optimizer.param_groups, self.rates
        for each, moved, group in zip(self._specs, self._moved, groups, strict=True):
            group["lr"] = rates[each.rate_flag] * step.factor
            grad = step.grads[each.name]
            grad = grad * before[each.name] if each.log else grad
            move = group["lr"] * root_mean_square(grad)
            is_relative = each.positive and not each.log
            scale = root_mean_square(before[each.name]) if is_relative else 1
            self._moves[each.name] = move / scale
            moved.grad = grad if each.bound is None else grad * (each.bound / move).clamp(max=1)
        self._optimizer.step()
        for each, moved in zip(self._specs, self._moved, strict=True):
            if each.log:
                self.learned[each.name].mul_(moved.exp())
                moved.zero_()
            if each.project:
                self.learned[each.name].copy_(each.project(self.learned[each.name]))
        # The last of them, a scalar, is what makes the others diverge.
        for each in reversed(self._specs):
            if problem := _problem(each, self.learned[each.name]):
                for name, value in before.items():
                    self.learned[name].copy_(value)
                raise self._diverged(f"{problem}: lower --{each.rate_flag}", each)
        self.ema_images.lerp_(self.images, 1 - self._ema_decay)
        self.iteration += 1

    def _diverged(self, reason: str, each: Learned | None = None) -> Diverged:
        """Name the rate of `each`, or of what the last step moved furthest, with a value by which
        that step would have been small; where it was, or there was none, a value to start from.
        """
        moves = dict.fromkeys(self.learned, 0.0) | {
            name: move.item() for name, move in self._moves.items()
        }
        each = each or max(self._specs, key=lambda spec: moves[spec.name])
        move = moves[each.name]
        starts = [spec.start for spec in self._specs if spec.start]
        if move <= LARGE_STEP and starts:
            flag, value = starts[0]
        else:
            part = SMALL_STEP / move if SMALL_STEP < move < math.inf else SMALL_STEP
            flag, value = each.rate_flag, self.rates[each.rate_flag] * part
        return Diverged(f"{reason} (--{flag} {value:.1g}, say)", rate=each.rate_flag)

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each flag, halved as often as a rewind was for its sake."""
        halved = [rewind["rate"] for rewind in self.rewinds]
        return {
            each.rate_flag: each.rate / 2 ** halved.count(each.rate_flag) for each in self._specs
        }

    def rewind(self, saved: dict[str, Any], reason: Diverged) -> dict[str, Any]:
        """Go back to the state `saved` and on from there with half the rate that `reason` names.

        Returns the new entry of `rewinds`: plain values.
        """
        entry = {
            "iteration": self.iteration,
            "back_to": saved["iteration"],
            "rate": reason.rate,
            "value": self.rates[reason.rate] / 2,
            "reason": str(reason),
        }
        self.load_state_dict(saved | {"rewinds": [*self.rewinds, entry]})
        return entry

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            **self.learned,
            "ema_images": self.ema_images,
            "optimizer": self._optimizer.state_dict(),
            "rewinds": list(self.rewinds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        for name, value in self.learned.items():
            value.copy_(state[name])
        self.ema_images.copy_(state["ema_images"])
        self.rewinds = [dict(rewind) for rewind in state["rewinds"]]
        # Of the optimiser only the momenta count: the rates may have been halved since.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})


def _optimizer(learned: Sequence[Learned], moved: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam where all of it asks for that, else SGD with a momentum for each."""
    groups: list[dict[str, Any]] = [
        {"params": [value], "lr": each.rate} for each, value in zip(learned, moved, strict=True)
    ]
    if all(each.adam for each in learned):
        for group, each in zip(groups, learned, strict=True):
            group["betas"] = each.adam
        return torch.optim.Adam(groups)
    for group, each in zip(groups, learned, strict=True):
        group["momentum"] = each.momentum
    return torch.optim.SGD(groups)


def root_mean_square(values: Tensor) -> Tensor:
    """How large values are on the whole, a scalar."""
    return values.square().mean().sqrt()


def _problem(spec: Learned, value: Tensor) -> str | None:
    """Say why a learned value has become useless; None if it has not."""
    if spec.positive and not (value > 0).all():  # also true of NaN
        return f"{spec.name} became {value.min().item():.3g}"
    return None if value.isfinite().all() else f"the {spec.name} are not finite any more"
