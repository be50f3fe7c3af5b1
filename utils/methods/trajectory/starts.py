"""Which epochs of the experts the students start from."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StartEpochs:
    """Start epochs are drawn uniformly from first ... bound - 1.

    The bound is `end`, or grows to it linearly from `first_end` at iteration 0 until iteration
    `grown_at`: easy, early epochs come first (DATM, Guo et al., ICLR 2024). ValueError where a
    draw would have no choice.
    """

    end: int
    first: int = 0
    first_end: int | None = None
    grown_at: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.bound(0) <= self.end:
            raise ValueError(f"no start epochs from {self.first} below {self.bound(0)}")

    def bound(self, iteration: int) -> int:
        if self.first_end is None or iteration >= self.grown_at:
            return self.end
        return self.first_end + (self.end - self.first_end) * iteration // self.grown_at

    def draw(self, iteration: int, generator: torch.Generator) -> int:
        return int(torch.randint(self.first, self.bound(iteration), (1,), generator=generator))
