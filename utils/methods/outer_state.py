"""What an outer step changes: the synthetic images, syn_lr, their momenta, the moving average."""

from typing import Any

import torch
from torch import Tensor

from utils.methods.trajectory.unroll import Matching

MOMENTUM = 0.5  # of both optimisers, as in the field


class Diverged(Exception):
    """An outer step that cannot be taken; the message says why and which settings to lower.

    `rate` is the one of them that the outer step itself uses: lr_img or lr_lr.
    """

    def __init__(self, reason: str, *, rate: str) -> None:
        super().__init__(reason)
        self.rate = rate


class OuterState:
    """images (N, C, H, W) and the scalar syn_lr, each updated by SGD with momentum 0.5.

    `iteration` counts the steps taken. `rewinds` are the times that the run went back after it had
    diverged, oldest first; each has halved one of the two rates. `ema_images` is the exponential
    moving average of the images, which starts at the initial ones; after every step
    ema_images <- ema_decay * ema_images + (1 - ema_decay) * images.
    """

    def __init__(
        self, images: Tensor, syn_lr: float, *, lr_img: float, lr_lr: float, ema_decay: float
    ) -> None:
        self.iteration = 0
        self.images = images.clone()
        self.syn_lr = torch.tensor(syn_lr, dtype=images.dtype, device=images.device)
        self.ema_images = images.clone()
        self._ema_decay = ema_decay
        self._optimizer = torch.optim.SGD(
            [
                {"params": [self.images], "lr": lr_img},
                {"params": [self.syn_lr], "lr": lr_lr},
            ],
            momentum=MOMENTUM,
        )
        self._given_rates = {"lr_img": lr_img, "lr_lr": lr_lr}
        self.rewinds: list[dict[str, Any]] = []

    def step(self, matching: Matching) -> None:
        """Update from the gradients of `matching`. Raises Diverged, leaving the set as it was."""
        if not matching.loss.isfinite():
            raise Diverged(
                "the matching loss is not finite: lower --lr_img, --lr_teacher or --syn_steps",
                rate="lr_img",
            )
        before = self.images.clone(), self.syn_lr.clone()
        self.images.grad, self.syn_lr.grad = matching.grad_images, matching.grad_syn_lr
        self._optimizer.step()
        try:
            if not self.syn_lr > 0:  # also true of NaN
                raise Diverged(
                    f"syn_lr became {self.syn_lr.item():.3g}: lower --lr_lr", rate="lr_lr"
                )
            if not self.images.isfinite().all():
                raise Diverged("the images are not finite any more: lower --lr_img", rate="lr_img")
        except Diverged:
            self.images.copy_(before[0])
            self.syn_lr.copy_(before[1])
            raise
        self.ema_images.lerp_(self.images, 1 - self._ema_decay)
        self.iteration += 1

    @property
    def rates(self) -> dict[str, float]:
        """lr_img and lr_lr, halved as often as a rewind was for their sake."""
        halved = [rewind["rate"] for rewind in self.rewinds]
        return {name: rate / 2 ** halved.count(name) for name, rate in self._given_rates.items()}

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
            "images": self.images,
            "syn_lr": self.syn_lr,
            "ema_images": self.ema_images,
            "optimizer": self._optimizer.state_dict(),
            "rewinds": list(self.rewinds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.images.copy_(state["images"])
        self.syn_lr.copy_(state["syn_lr"])
        self.ema_images.copy_(state["ema_images"])
        self.rewinds = [dict(rewind) for rewind in state["rewinds"]]
        # Of the optimiser only the momenta count: the rates may have been halved since.
        groups = self._optimizer.state_dict()["param_groups"]
        for group, rate in zip(groups, self.rates.values(), strict=True):
            group["lr"] = rate
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
