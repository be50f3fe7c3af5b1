"""Check one way of running against the full graph of plain steps before anything relies on it.

    python -m scripts.gpu.gate graphs+compiled gate.json

A process for each, since a capture that fails may leave its process of no use.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from scripts.gpu.choice import MODES, Mode
from utils.compute.device import default_device, use_precision
from utils.compute.execution import Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.core.files import write_text
from utils.core.provenance import describe_environment
from utils.core.rng import stream
from utils.core.script import Parser, run_script
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.methods.trajectory.lengths import DISTANCES, fixed
from utils.methods.trajectory.matching import (
    Matching,
    Objective,
    match_by_adjoint,
    match_by_autograd,
)
from utils.methods.trajectory.problems import draw_problem
from utils.methods.trajectory.unroll import Loss, Problem, Steps

Inputs = tuple[Problem, Tensor, Tensor, Tensor]  # with images, syn_lr and labels

CLASSES = 10
OUTER_STEPS = 3  # the first one captures, the others replay
TOLERANCES = {"float64": 1e-8, "float32": 1e-2}
JUDGED = {"float64": ("loss", "grad_images", "grad_syn_lr"), "float32": ("loss",)}
OBJECTIVE = Objective(DISTANCES["l2"], fixed)


def draw(network: nn.Module, res: int, syn_steps: int, device: torch.device, step: int) -> Inputs:
    """Draw an outer step on random images, one a class, with parameters in float64."""
    rng = stream(0, "gate", step)
    theta_0 = flatten(network.parameters()).detach().double()[None]
    theta_star = theta_0 + 0.01 * torch.randn(theta_0.shape, generator=rng).to(theta_0)
    images = torch.randn(CLASSES, 3, res, res, generator=rng, dtype=torch.float64).to(device)
    problem = draw_problem(
        theta_0,
        theta_star,
        images[0],
        count=CLASSES,
        syn_steps=syn_steps,
        batch_syn=None,
        dsa_groups=parse_strategy(DSA_STRATEGY),
        generators=[rng],
    )
    syn_lr = torch.tensor(0.01, dtype=torch.float64, device=device)
    return problem, images, syn_lr, torch.arange(CLASSES, device=device)


def in_float32(inputs: Inputs) -> Inputs:
    problem, images, syn_lr, labels = inputs
    assert problem.theta_star is not None
    theta_0, theta_star = problem.theta_0.float(), problem.theta_star.float()
    problem = replace(problem, theta_0=theta_0, theta_star=theta_star)
    return problem, images.float(), syn_lr.float(), labels


def loss_of(network: nn.Module) -> Loss:
    flat = FlatNetwork(network)
    return lambda theta, x, y: F.cross_entropy(flat(theta, x), y)


def worst_errors(found: Sequence[Matching], expected: Sequence[Matching]) -> dict[str, float]:
    """The largest relative error over the outer steps, of the loss and of each gradient."""
    errors = {}
    for name in JUDGED["float64"]:
        pairs = zip(found, expected, strict=True)
        of_steps = [relative_error(getattr(a, name), getattr(b, name)) for a, b in pairs]
        errors[name] = torch.tensor(of_steps).max().item()  # which keeps NaN
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def is_right(errors: dict[str, dict[str, float]]) -> bool:
    """Whether all that is judged of the `errors` so far is within its tolerance; NaN is not."""
    return all(
        of_dtype[name] <= TOLERANCES[dtype]
        for dtype, of_dtype in errors.items()
        for name in JUDGED[dtype]
    )


def check(mode: Mode, *, model: str, res: int, syn_steps: int) -> Iterator[dict[str, Any]]:
    """Compare outer steps in `mode` with plain ones in float64; yield whether they are right and
    how far they are off: in float64, then in float32 at the device's default precision as well.
    """
    device = default_device()
    if mode.cuda_graphs and device.type != "cuda":
        yield {"right": False, "skipped": "no CUDA device: nothing is captured"}
        return
    cuda_graphs = "on" if mode.cuda_graphs else "off"
    execution = Execution.on(device, compiled=mode.compiled, cuda_graphs=cuda_graphs)
    shape = {"channels": 3, "num_classes": CLASSES, "image_size": res}

    def make(dtype: torch.dtype) -> nn.Module:
        return build_network(model, **shape, seed=0).to(device, dtype)

    def run(inputs: Sequence[Inputs], dtype: torch.dtype) -> list[Matching]:
        steps = Steps.of(loss_of(execution.adapt(make(dtype))), execution)
        return [match_by_adjoint(*each, steps, OBJECTIVE) for each in inputs]

    plain = make(torch.float64)
    inputs = [draw(plain, res, syn_steps, device, step) for step in range(OUTER_STEPS)]
    expected = [match_by_autograd(*each, loss_of(plain), OBJECTIVE) for each in inputs]
    errors = {"float64": worst_errors(run(inputs, torch.float64), expected)}
    yield {"right": is_right(errors), "errors": errors}
    precision = use_precision(None, device)
    errors["float32"] = worst_errors(run([*map(in_float32, inputs)], torch.float32), expected)
    yield {"right": is_right(errors), "errors": errors, "precision": precision}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="scripts.gpu.gate", description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--model", default="ConvNetD3")
    parser.add_argument("--res", type=int, default=32)
    parser.add_argument("--syn_steps", type=int, default=5)
    args = parser.parse_args(argv)
    began = time.monotonic()
    common = {"mode": args.mode, "environment": describe_environment()}
    mode = MODES[args.mode]
    try:
        for record in check(mode, model=args.model, res=args.res, syn_steps=args.syn_steps):
            record |= common | {"seconds": time.monotonic() - began}
            write_text(json.dumps(record, indent=1) + "\n", args.out)
            print(f"{args.mode}: {record.get('errors', record.get('skipped'))}")
    except Exception as error:  # of any kind; what was right before does not count then
        write_text(json.dumps(common | {"right": False, "error": str(error)}) + "\n", args.out)
        raise
    return 0 if record["right"] or "skipped" in record else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
