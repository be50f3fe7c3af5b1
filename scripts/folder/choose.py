"""Choose size, network, experts, steps and networks that measure for the minutes given.

Nothing here looks at files or takes time: what was found and how fast the machine is are given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from utils.compute.cost import GRADIENT_PASSES, NetworkCost, expert_bytes
from utils.methods.trajectory.tuning import find_lengths
from utils.methods.unroll.work import ADJOINT_PASSES, GRADIENTS_A_STEP

# (side, network): the field's depth for each side, whose last maps are 4x4, and narrower networks
# where there is little time.
CANDIDATES = (
    (128, "ConvNetD5"),
    (64, "ConvNetD4"),
    (32, "ConvNetD3"),
    (32, "ConvNetW64"),
    (32, "ConvNetW32"),
    (16, "ConvNetD2"),
    (8, "ConvNetD1"),
)
# Parts of the time, after what has been used by then.
EXPERTS_SHARE, MEASURE_SHARE = 0.3, 0.2
EXPERT_STEPS = 1000  # of an expert, where its epochs allow
EPOCHS = (20, 60)  # of an expert, fewest and most
EXPERTS = (3, 100)
OUTER_STEPS = (20, 50_000)
WORTH_IT = 60  # outer steps that a larger size needs
NETWORKS = (2, 5)  # that measure each set
NETWORK_EPOCHS = (100, 1000)
BATCH = 256  # images of a training step at most, by default
SETS = 3  # that are measured: the distilled one, random and k-center real images
DISK = 4 * 10**9  # that experts may take
REPORT_SECONDS = 8
PROBES = 20  # outer steps' time that finding the rates takes


@dataclass(frozen=True)
class Found:
    """What was found in the folder: images by class, and the middle of their short sides."""

    classes: int
    channels: int
    train: int
    test: int
    smallest_class: int
    short_side: int


@dataclass(frozen=True)
class Speed:
    """How fast this machine trains: FLOP a second, and the least time of a step, in seconds."""

    rate: float
    step_seconds: float = 0.0

    def seconds(self, flop: float, steps: float) -> float:
        return flop / self.rate + steps * self.step_seconds


@dataclass(frozen=True)
class Plan:
    """What is run, and how many seconds each part of it is predicted to take."""

    res: int
    model: str
    ipc: int
    num_experts: int
    train_epochs: int
    Iteration: int
    num_eval: int
    epoch_eval_train: int
    expert_seconds: float
    distil_seconds: float
    measure_seconds: float

    @property
    def seconds(self) -> float:
        return self.expert_seconds + self.distil_seconds + self.measure_seconds + REPORT_SECONDS


Count = Callable[[str, int], NetworkCost]  # of a network at a side


def candidates(short_side: int) -> Sequence[tuple[int, str]]:
    """Those that are no larger than the pictures: nothing is learned from enlarged ones."""
    nearest = max(8, 2 ** round(math.log2(max(1, short_side))))
    return [each for each in CANDIDATES if each[0] <= nearest] or CANDIDATES[-1:]


def choose(
    found: Found, count: Count, speed: Callable[[str, int], Speed], *, ipc: int, seconds: float
) -> Plan:
    """Choose the largest size and network for which enough is done in `seconds`, or where none
    is, the one that takes the least time.
    """
    plans = []
    for res, model in candidates(found.short_side):
        plan = fill(found, count(model, res), speed(model, res), res, model, ipc, seconds)
        if plan.seconds <= seconds and plan.Iteration >= WORTH_IT:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.seconds)


def fill(
    found: Found,
    cost: NetworkCost,
    speed: Speed,
    res: int,
    model: str,
    ipc: int,
    seconds: float,
    epoch_seconds: float | None = None,
) -> Plan:
    """Divide `seconds` over the parts, with no less than the least of each.

    `epoch_seconds` are those of an expert, where they were measured.
    """
    room = max(0.0, seconds - REPORT_SECONDS)
    steps_an_epoch = -(-found.train // BATCH)
    epochs = between(EPOCHS, EXPERT_STEPS / steps_an_epoch)
    epoch = epoch_seconds or expert_epoch_seconds(found, cost, speed)
    most = max(EXPERTS[0], DISK // expert_bytes(cost, epochs=epochs))
    experts = min(most, between(EXPERTS, EXPERTS_SHARE * room / (epoch * epochs)))

    images = found.classes * ipc
    network_epoch = speed.seconds(cost.flop * GRADIENT_PASSES * images, -(-images // BATCH))
    for_measuring = MEASURE_SHARE * room
    networks = between(NETWORKS, for_measuring / (SETS * 300 * network_epoch))
    network_epochs = between(NETWORK_EPOCHS, for_measuring / (SETS * networks * network_epoch))
    measuring = SETS * networks * network_epochs * network_epoch

    training = experts * epochs * epoch
    lengths = find_lengths(
        SimpleNamespace(ipc=ipc),
        epochs=epochs,
        steps_an_epoch=steps_an_epoch,
        is_open=lambda name: True,
    )
    step = outer_step_seconds(cost, speed, images, lengths["syn_steps"])
    left = room - training - measuring - PROBES * step
    steps = between(OUTER_STEPS, left / step)
    return Plan(
        res=res,
        model=model,
        ipc=ipc,
        num_experts=experts,
        train_epochs=epochs,
        Iteration=steps,
        num_eval=networks,
        epoch_eval_train=network_epochs,
        expert_seconds=training,
        distil_seconds=(steps + PROBES) * step,
        measure_seconds=measuring,
    )


def expert_epoch_seconds(found: Found, cost: NetworkCost, speed: Speed) -> float:
    """Of training on all images and testing."""
    flop = cost.flop * (GRADIENT_PASSES * found.train + found.test)
    return speed.seconds(flop, -(-found.train // BATCH) + 1)


def outer_step_seconds(cost: NetworkCost, speed: Speed, images: int, syn_steps: int) -> float:
    """Of a student that takes all its steps there and back; the real ones are timed later."""
    flop = syn_steps * images * cost.flop * (GRADIENT_PASSES + ADJOINT_PASSES)
    return speed.seconds(flop, GRADIENTS_A_STEP * syn_steps)


def experts_that_fit(trained: int, each: float, plan: Plan) -> int:
    """Experts in all, where `trained` took `each` seconds: no more than planned."""
    return max(trained, min(plan.num_experts, int(plan.expert_seconds / each)))


def steps_that_fit(taken: int, step: float, seconds: float) -> int:
    """Outer steps in all where `taken` are taken, each takes `step` and `seconds` are left."""
    return max(taken, between(OUTER_STEPS, taken + seconds / step))


def between(bounds: tuple[int, int], value: float) -> int:
    least, most = bounds
    return int(max(least, min(most, value)))
