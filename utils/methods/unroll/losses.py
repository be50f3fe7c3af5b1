"""Training losses of students, and losses of what they end as."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from utils.compute.flat import FlatNetwork
from utils.methods.unroll.steps import Loss

# What learned labels (N, C) are -> probabilities
LABEL_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda labels: labels,
    "logits": lambda labels: labels.softmax(-1),
}


def hard_loss(network: FlatNetwork) -> Loss:
    """The mean cross-entropy with labels y (B,)."""
    return lambda theta, x, y: F.cross_entropy(network(theta, x), y)


def soft_loss(network: FlatNetwork, form: str) -> Loss:
    """The mean over the batch of -sum_c p_c log softmax(f(x))_c, with p of labels y (B, C) that are
    probabilities or logits, a key of LABEL_FORMS.
    """

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        likelihoods = F.log_softmax(network(theta, x), 1)
        return -(LABEL_FORMS[form](y) * likelihoods).sum(1).mean()

    return loss
