"""A network that trains by SGD on the synthetic images between outer steps, as DC's and CAFE's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.methods.unroll.problem import draw_problem
from utils.methods.unroll.students import Students


@dataclass(frozen=True)
class InnerTraining:
    """SGD with the rate `lr_net`, a scalar, `batch_syn` images a step (None: all), augmented by
    `dsa_groups`; labels (N,) are those of the synthetic images.

    Several processes divide the batches.
    """

    students: Students
    labels: Tensor
    lr_net: Tensor
    batch_syn: int | None
    dsa_groups: tuple[str, ...] | None

    def __call__(
        self, theta: Tensor, images: Tensor, *, epochs: int, generator: torch.Generator
    ) -> Tensor:
        """theta (1, P) after so many epochs on images (N, C, H, W)."""
        batch = min(self.batch_syn or len(images), len(images))
        problem = draw_problem(
            theta,
            None,
            images[0],
            count=len(images),
            syn_steps=epochs * -(-len(images) // batch),
            batch_syn=batch,
            dsa_groups=self.dsa_groups,
            generators=[generator],
            share=self.students.share,
        )
        return self.students.train(images, self.lr_net, self.labels, problem)
