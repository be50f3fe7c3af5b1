"""What outer steps change: whatever a method learns, its momenta, the images' moving average."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.methods.base import Learned, Step

MOMENTUM = 0.5  # of all optimisers, as in the field


class Diverged(Exception):
    """An outer step that cannot be taken; the message says why and which settings to lower.

    `rate` is the one of them that the outer step itself uses: lr_img or lr_lr, say.
    """

    def __init__(self, reason: str, *, rate: str) -> None:
        super().__init__(reason)
        self.rate = rate


class OuterState:
    """What is learned, by name: "images" (N, C, H, W) first. Each is updated by SGD with momentum.

    `iteration` counts the steps taken. `rewinds` are the times that the run went back after it had
    diverged, oldest first; each has halved one of the rates. `ema_images` is the exponential moving
    average of the images, which starts at the initial ones; after every step
    ema_images <- ema_decay * ema_images + (1 - ema_decay) * images. `syn_lr` is the rate of
    networks that train on the images: what was learned, or the given one. `if_not_finite` says what
    to lower where the loss is not finite.
    """

    def __init__(
        self, learned: Sequence[Learned], *, syn_lr: float, ema_decay: float, if_not_finite: str
    ) -> None:
        self.iteration = 0
        self.learned = {each.name: each.initial.clone() for each in learned}
        self.ema_images = self.images.clone()
        self.rewinds: list[dict[str, Any]] = []
        self._specs = list(learned)
        self._given_syn_lr = syn_lr
        self._ema_decay = ema_decay
        self._if_not_finite = if_not_finite
        self._optimizer = torch.optim.SGD(
            [{"params": [self.learned[each.name]], "lr": each.rate} for each in learned],
            momentum=MOMENTUM,
        )

    @property
    def images(self) -> Tensor:
        return self.learned["images"]

    @property
    def syn_lr(self) -> float:
        return self.learned["syn_lr"].item() if "syn_lr" in self.learned else self._given_syn_lr

    def update(self, step: Step) -> None:
        """Update from the gradients of `step`. Raises Diverged, leaving all as it was."""
        if not step.loss.isfinite():
            raise Diverged(self._if_not_finite, rate=self._specs[0].rate_flag)
        before = {name: value.clone() for name, value in self.learned.items()}
        for name, value in self.learned.items():
            value.grad = step.grads[name]
        for group, rate in zip(self._optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * step.factor
        self._optimizer.step()
        try:
            for each in reversed(self._specs):
                _check(each, self.learned[each.name])
        except Diverged:
            for name, value in self.learned.items():
                value.copy_(before[name])
            raise
        self.ema_images.lerp_(self.images, 1 - self._ema_decay)
        self.iteration += 1

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


def _check(spec: Learned, value: Tensor) -> None:
    """Raise Diverged where a learned value has become useless."""
    if spec.positive and not (value > 0).all():  # also true of NaN
        raise Diverged(
            f"{spec.name} became {value.min().item():.3g}: lower --{spec.rate_flag}",
            rate=spec.rate_flag,
        )
    if not value.isfinite().all():
        raise Diverged(
            f"the {spec.name} are not finite any more: lower --{spec.rate_flag}",
            rate=spec.rate_flag,
        )
