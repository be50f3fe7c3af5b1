"""What soft labels are: of which forms networks make probabilities, and which they regress on."""

from collections.abc import Callable, Mapping

from torch import Tensor

# What soft labels (..., C) that networks train on are -> probabilities
LABEL_FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda labels: labels.softmax(-1),
    "probabilities": lambda labels: labels,
}
CENTRED = "centred"  # labels to regress on: real numbers around 0
