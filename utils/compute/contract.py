"""Check that networks from elsewhere do what this program asks of a network, before any work.

Networks run as functions of one vector (`flat.py`). To train them it takes logits (N, num_classes)
and their gradient. For experts and students it takes more: a step that is computed again must be
the same step, and be differentiable once more. The networks of `networks/` do all that; here the
others are tried on a few images, on the CPU.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network, elsewhere
from utils.compute.flat import (
    FlatNetwork,
    TrainingNetwork,
    flatten,
    float_buffers,
    without_batch_counts,
)
from utils.core.errors import UserError

IMAGES = 2  # that a network is tried on, and then on one more
LOOPS = "There is a performance drop"  # what vmap says where it calls an operation again and again


@dataclass(frozen=True)
class Abilities:
    """What may be done with the training of a network.

    Attributes:
        repeats: the same step twice gives the same result.
        vectorises: several networks as one call of vmap.
        takes_one: batches of one image, which batch norm behind 1x1 maps has no statistics of.
    """

    repeats: bool = True
    vectorises: bool = True
    takes_one: bool = True


class UntraceableError(UserError):
    """The compiler cannot follow a network, which is the `problem`."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"--compile on: {problem}; pass --compile off")
        self.problem = problem


def check_known(models: Sequence[str]) -> None:
    """UserError where a network from elsewhere is not there; it is imported, not made."""
    for model in models:
        if elsewhere.is_elsewhere(model):
            try:
                elsewhere.find(model)
            except elsewhere.NetworkError as error:
                raise UserError(f"--model {model}: {error}") from None


@cache
def abilities(model: str, *, channels: int, num_classes: int, image_size: int) -> Abilities:
    """Try to train `model`; UserError where it cannot be trained on images of that shape."""
    if not elsewhere.is_elsewhere(model):
        return Abilities()
    with _tried(model, channels, num_classes, image_size) as (network, images, labels):
        for is_training in (False, True):
            for tried in (images, torch.cat([images, images[:1]])):
                seen = tried.clone()
                _check_logits(model, network.train(is_training)(seen), len(tried), num_classes)
                if not torch.equal(seen, tried):
                    raise UserError(
                        f"--model {model} changes the images that it is given: others would train "
                        "and be tested on what it leaves; let it work on a copy"
                    )
        trained = TrainingNetwork(without_batch_counts(network))
        theta = flatten(network.parameters()).detach()
        kept = flatten([theta.new_empty(0), *float_buffers(network).values()])

    loss = _loss(trained, labels)

    def by_autograd() -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, kept, images), leaf)[0]

    def vectorised() -> object:
        gradients = torch.func.vmap(torch.func.grad(loss), randomness="different")
        warnings.filterwarnings("error", message=LOOPS)
        return gradients(*(torch.stack([each, each]) for each in (theta, kept, images)))

    with _one_line(model, image_size, "has no gradient"):
        repeats = torch.equal(by_autograd(), by_autograd())
    with warnings.catch_warnings():
        return Abilities(
            repeats=repeats,
            vectorises=_works(vectorised),
            takes_one=_works(lambda: trained(theta, kept, images[:1])),
        )


def _loss(trained: TrainingNetwork, labels: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(theta: Tensor, statistics: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(trained(theta, statistics, images)[0], labels)

    return loss


def check_batches(
    model: str,
    images: int,
    batch: int,
    flag: str = "--batch_train",
    /,
    *,
    channels: int,
    num_classes: int,
    image_size: int,
) -> None:
    """UserError where `images` in batches of at most `batch`, which is that of `flag`, have one of
    one image, and `model` cannot be trained on that.
    """
    shape = {"channels": channels, "num_classes": num_classes, "image_size": image_size}
    if (batch == 1 or images % batch == 1) and not abilities(model, **shape).takes_one:
        raise UserError(
            f"--model {model} cannot be trained on a batch of one image (batch norm?), and "
            f"{images} images in batches of {batch} have one: pass another {flag}"
        )


@cache
def check_traceable(model: str, *, channels: int, num_classes: int, image_size: int) -> None:
    """UntraceableError where torch.compile cannot follow the training of `model`."""
    if not elsewhere.is_elsewhere(model):
        return
    with _tried(model, channels, num_classes, image_size) as (network, images, labels):
        loss = _loss(TrainingNetwork(without_batch_counts(network)), labels)
        theta = flatten(network.parameters()).detach()
        kept = flatten([theta.new_empty(0), *float_buffers(network).values()])
    try:
        torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)(theta, kept, images)
    except Exception as error:
        raise UntraceableError(
            f"the compiler cannot follow {model} ({type(error).__name__})"
        ) from None


@cache
def check_repeatable(model: str, *, channels: int, num_classes: int, image_size: int) -> None:
    """UserError where `model` does not serve as expert and student: where it answers differently
    twice, remembers what it has seen, or cannot be differentiated twice.

    Attention is computed plainly from then on in this process: its fused kernels have one
    derivative only.
    """
    shape = {"channels": channels, "num_classes": num_classes, "image_size": image_size}
    if not elsewhere.is_elsewhere(model):
        return
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, switch)(False)  # on a CPU too
    instead = "choose another --model for experts and students (eval.py takes it)"
    if not abilities(model, **shape).repeats:
        raise UserError(
            f"--model {model} answers differently when it is asked twice (dropout?): a step that "
            f"is computed again would be another one; set dropout to 0, or {instead}"
        )
    with _tried(model, channels, num_classes, image_size) as (network, images, labels):
        flat = FlatNetwork(network)
        theta = flatten(network.parameters()).detach()
        before = {name: value.clone() for name, value in network.named_buffers()}
        flat(theta, images)
    for name, value in network.named_buffers():
        if not torch.equal(value, before[name]):
            raise UserError(
                f"--model {model} changes its buffer {name} when it is called: a step that is "
                f"computed again would be another one; {instead}"
            )

    def loss(theta: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(flat(theta, images), labels)

    with _one_line(model, image_size, "cannot be differentiated twice", instead):
        leaf, seen = theta.clone().requires_grad_(), images.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf, seen), leaf, create_graph=True)
        torch.autograd.grad(g.square().sum(), (leaf, seen), allow_unused=True)
        torch.func.jvp(torch.func.grad(loss, (0, 1)), (theta, images), (theta, images))


def check_head(model: str, *, channels: int, num_classes: int, image_size: int, why: str) -> None:
    """UserError where the last linear layer of `model` does not give its logits; `why` says what
    needs features.
    """
    if not elsewhere.is_elsewhere(model):
        return
    outputs: list[Tensor] = []
    with _tried(model, channels, num_classes, image_size) as (network, images, _):
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        for module in linear[-1:]:
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
        logits = network.eval()(images)
    if not (outputs and outputs[-1].shape == logits.shape and torch.equal(outputs[-1], logits)):
        raise UserError(
            f"--model {model}: its last nn.Linear does not give its logits, so that there are no "
            f"features for {why}"
        )


@contextmanager
def _tried(
    model: str, channels: int, num_classes: int, image_size: int
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """A fresh network on the CPU, two images and their labels; torch's generator stays as it is,
    and what fails in the block is one line.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, channels, image_size, image_size, generator=generator)
    labels = torch.arange(IMAGES) % num_classes
    shape = {"channels": channels, "num_classes": num_classes, "image_size": image_size}
    with _one_line(model, image_size, "cannot be used"), torch.random.fork_rng(devices=[]):
        yield build_network(model, **shape, seed=0), images, labels


@contextmanager
def _one_line(model: str, image_size: int, problem: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except elsewhere.NetworkError as error:
        raise UserError(f"--model {error}") from None
    except (Exception, SystemExit) as error:  # the code of somebody else
        raise UserError(
            f"--model {model} {problem} at {image_size}x{image_size} pixels: "
            f"{elsewhere.reason(error)}{advice and '; ' + advice}"
        ) from None


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
        return True
    except Exception:  # whatever the code of somebody else fails with
        return False


def _check_logits(model: str, logits: object, images: int, num_classes: int) -> None:
    wanted = (images, num_classes)
    found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        raise UserError(
            f"--model {model} answers with {found} instead of logits of shape {wanted} to "
            f"{images} images of {num_classes} classes"
        )
    if not logits.is_floating_point() or not logits.isfinite().all():
        raise UserError(f"--model {model} answers with logits that are not finite numbers")
