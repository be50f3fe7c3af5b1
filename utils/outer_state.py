"""What an outer step changes: the synthetic images, syn_lr, their momenta, the moving average."""

from typing import Any

import torch
from torch import Tensor

from utils.unroll import Matching

MOMENTUM = 0.5  # of both optimisers, as in the field


class Diverged(Exception):
    """An outer step that cannot be taken; the message says why and which setting to lower."""


class OuterState:
    """images (N, C, H, W) and the scalar syn_lr, each updated by SGD with momentum 0.5.

    `iteration` counts the steps taken. `ema_images` is the exponential moving average of the
    images, which starts at the initial ones; after every step
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

    def step(self, matching: Matching) -> None:
        """Update from the gradients of `matching`. Raises Diverged, leaving the set as it was."""
        if not matching.loss.isfinite():
            raise Diverged(
                "the matching loss is not finite: lower --lr_img, --lr_teacher or --syn_steps"
            )
        before = self.images.clone(), self.syn_lr.clone()
        self.images.grad, self.syn_lr.grad = matching.grad_images, matching.grad_syn_lr
        self._optimizer.step()
        try:
            if not self.syn_lr > 0:  # also true of NaN
                raise Diverged(f"syn_lr became {self.syn_lr.item():.3g}: lower --lr_lr")
            if not self.images.isfinite().all():
                raise Diverged("the images are not finite any more: lower --lr_img")
        except Diverged:
            self.images.copy_(before[0])
            self.syn_lr.copy_(before[1])
            raise
        self.ema_images.lerp_(self.images, 1 - self._ema_decay)
        self.iteration += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "images": self.images,
            "syn_lr": self.syn_lr,
            "ema_images": self.ema_images,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.images.copy_(state["images"])
        self.syn_lr.copy_(state["syn_lr"])
        self.ema_images.copy_(state["ema_images"])
        # What the optimiser brings along besides its momenta (the rates) stays as it was given.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
