"""The loss of outputs against labels: one class for each image, or something about every class."""

from torch import Tensor
from torch.nn import functional as F

from utils.data.label_forms import CENTRED, LABEL_FORMS


def training_loss(outputs: Tensor, labels: Tensor, form: str | None = None) -> Tensor:
    """What training lowers: the squared error for CENTRED labels, else the cross-entropy."""
    if form == CENTRED:
        return squared_error(outputs, labels)
    return cross_entropy(outputs, labels, form)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half of the mean over images and classes of (outputs - labels)^2, both (B, C): KIP's loss."""
    return F.mse_loss(outputs, labels) / 2


def cross_entropy(logits: Tensor, labels: Tensor, form: str | None = None) -> Tensor:
    """The mean over logits (B, C) of -sum_c p_c log softmax(logits)_c, a scalar.

    Without a form labels (B,) are classes, whose p is 1. Soft ones (B, C) have one of LABEL_FORMS.
    """
    if form is None:
        return F.cross_entropy(logits, labels)
    return -(LABEL_FORMS[form](labels) * F.log_softmax(logits, 1)).sum(1).mean()


def likeliest(labels: Tensor, form: str | None = None) -> Tensor:
    """The class (B,) that labels name, or find the likeliest."""
    return labels if form is None else labels.argmax(-1)
