"""Find the lengths and rates of trajectory matching on experts and data, where nobody gives them.

Lengths follow from how long the experts are, rates from the losses and gradients of a few outer
steps that are not taken.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from utils.methods.base import Method, Step
from utils.methods.outer_state import root_mean_square

EXPERT_STEPS = 20  # that a target is at least behind its start
MOST_STEPS, LEAST_STEPS = 50, 20  # of a student
PROBES = 4  # outer steps that are looked at
RATE_FACTOR = 10**0.5  # between the values of syn_lr that are tried
RATES = (1e-5, 10.0)  # the first and the last of them
# How far a first step moves the images, in their standard deviations, and the logarithm of syn_lr.
IMAGE_STEP, RATE_STEP = 0.03, 0.02
MAX_UPDATE = 0.1
STALLED_LOSS = 0.95

IsOpen = Callable[[str], bool]  # whether a flag of this name has been given no value


def find_lengths(
    options: Any, *, epochs: int, steps_an_epoch: int, is_open: IsOpen
) -> Mapping[str, int]:
    """Choose N_S, N_T and the range of start epochs for experts of so many epochs.

    A target lies some steps of the expert behind its start, at most half of its epochs. More images
    a class can follow later parts of a trajectory (Sec. 4 of MTT): a tenth of the epochs at one
    image a class, four tenths at ten, eight at most.
    """
    apart = max(round(epochs / 25), math.ceil(EXPERT_STEPS / steps_an_epoch))
    apart = max(1, min(apart, epochs // 2))
    starts = round(epochs * min(0.8, 0.1 * options.ipc**0.6))
    found = {
        "syn_steps": min(MOST_STEPS, max(LEAST_STEPS, apart * steps_an_epoch)),
        "expert_epochs": apart,
        "max_start_epoch": max(1, min(starts, epochs - apart + 1)),
    }
    return {name: value for name, value in found.items() if is_open(name)}


def find_rates(
    options: Any,
    method: Method,
    images: Tensor,
    soft_labels: Tensor | None = None,
    *,
    is_open: IsOpen,
) -> Mapping[str, float | bool]:
    """Choose syn_lr by the loss of the first outer steps, the other rates by their gradients.

    syn_lr starts where students come nearest to their targets. The first steps then move the images
    by IMAGE_STEP and syn_lr by the part RATE_STEP of itself.
    """
    if not any(map(is_open, ("lr_teacher", "lr_img", "lr_lr"))):
        return {}

    def probe(syn_lr: float) -> list[Step]:
        learned = {"images": images, "syn_lr": images.new_tensor(syn_lr)}
        if soft_labels is not None:
            learned["labels"] = soft_labels
        return [method.step(number, learned) for number in range(PROBES)]

    syn_lr, steps = options.lr_teacher, probe(options.lr_teacher)
    found: dict[str, float | bool] = {}
    if is_open("lr_teacher"):
        syn_lr, steps = _best(probe, syn_lr, steps)
        found["lr_teacher"] = syn_lr
    if is_open("lr_img"):
        found["lr_img"] = _rounded(IMAGE_STEP / _typical(steps, "images"))
        found["max_update"] = MAX_UPDATE
    if is_open("lr_lr"):
        by_log = is_open("log_syn_lr") or options.log_syn_lr
        size = _typical(steps, "syn_lr") * (syn_lr if by_log else 1)
        found["lr_lr"] = _rounded(RATE_STEP * (1 if by_log else syn_lr) / size)
        found["log_syn_lr"] = by_log
    return {name: value for name, value in found.items() if is_open(name)}


def stalled(losses: Sequence[float], records: Sequence[Mapping[str, Any]]) -> str | None:
    """Say so where students come no nearer to their targets: length 1, at a loss near 1."""
    lengths = [record["length"] for record in records]
    stays = all(n == 1 for each in lengths for n in (each if isinstance(each, list) else [each]))
    if not stays or (mean := statistics.fmean(losses)) < STALLED_LOSS:
        return None
    return (
        f"the last {len(losses)} steps had length 1 and a mean loss of {mean:.2f}: nothing is "
        "learned. Leave --lr_img, --lr_lr and --lr_teacher out, so that they are found on the "
        "data, or give a lower --lr_teacher; experts of more epochs may help too"
    )


def _best(
    probe: Callable[[float], list[Step]], start: float, steps: list[Step]
) -> tuple[float, list[Step]]:
    """Walk from `start`, where `steps` were made, to the syn_lr of the least loss."""
    best, reached = (start, steps), _loss(steps)
    for factor in (RATE_FACTOR, 1 / RATE_FACTOR):
        while RATES[0] <= (value := _rounded(best[0] * factor)) <= RATES[1]:
            steps = probe(value)
            if not (loss := _loss(steps)) < reached:
                break
            best, reached = (value, steps), loss
        if best[0] != start:
            break
    return best


def _loss(steps: list[Step]) -> float:
    mean = statistics.fmean(step.loss.item() for step in steps)
    return mean if math.isfinite(mean) else math.inf


def _typical(steps: list[Step], name: str) -> float:
    """The median size of a gradient, as a root mean square; 1 where none is of use."""
    sizes = [root_mean_square(step.grads[name]).item() for step in steps]
    return statistics.median([size for size in sizes if 0 < size < math.inf] or [1.0])


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
