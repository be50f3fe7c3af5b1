"""Say how networks are trained on a distilled set: its recipe, plain values that JSON keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.data.augment import active_groups
from utils.data.distilled import SyntheticSet, batches_in_order
from utils.data.identity import PIXELS
from utils.data.label_forms import LABEL_FORMS

# The field's protocol.
EPOCHS = 1000
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

FOR_KERNELS = (
    "This set was made for kernel regression with the kernel in `kernel`. Networks are trained on "
    "its classes here, which its method does not promise to do well."
)


def recipe_of(
    distilled: SyntheticSet,
    *,
    epochs: int = EPOCHS,
    batch_size: int | None = None,
    dsa_strategy: str | None = None,
) -> dict[str, Any]:
    """Describe a set and how networks are trained on it.

    Where the steps themselves are part of the set (`step_lrs`, `train_steps`), these are the
    training. Else it is the field's protocol with `epochs` and, unless they are given, the batch
    size and the augmentation of the distillation; a `dsa_strategy` of "none" is none.
    """
    config = distilled.config
    if dsa_strategy is None:
        dsa_strategy = config["dsa_strategy"] if config["dsa"] else "none"
    is_soft = distilled.label_form in LABEL_FORMS
    kernel_values = ("kernel", "kernel_depth", "reg") if "kernel" in config else ()
    return {
        "format": 1,
        "dataset": distilled.dataset,
        "subset": distilled.subset,
        "class_names": list(distilled.class_names),
        "ipc": distilled.ipc,
        "image_shape": list(distilled.images.shape[1:]),
        "space": "whitened" if distilled.normalisation.zca else "normalised",
        "pixels": {"fit": config.get("fit", "crop"), **(distilled.data or {}).get(PIXELS, {})},
        "labels": distilled.label_form if is_soft else "classes",
        "network": distilled.model,
        "training": _own_training(distilled)
        or _protocol(
            distilled.syn_lr,
            epochs,
            batch_size or config["batch_train"],
            active_groups(dsa=True, strategy=dsa_strategy) or (),
        ),
        "kernel": {name: config[name] for name in kernel_values},
        "notes": [FOR_KERNELS] if kernel_values else [],
    }


def phases(lr: float, epochs: int) -> list[tuple[int, float]]:
    """Divide a training into (epochs, rate): the rate falls to a tenth once, at half of them."""
    before = epochs // 2 if epochs > 1 else epochs
    both = ((before, lr), (epochs - before, 0.1 * lr))
    return [(count, rate) for count, rate in both if count > 0]


def _protocol(lr: float, epochs: int, batch_size: int, groups: Sequence[str]) -> Mapping[str, Any]:
    """SGD in epochs; every batch gets one draw of DSA from `groups`, if there are any."""
    return {
        "kind": "epochs",
        "phases": [list(phase) for phase in phases(lr, epochs)],
        "batch_size": batch_size,
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "augmentation": list(groups),
    }


def _own_training(distilled: SyntheticSet) -> Mapping[str, Any] | None:
    """The training that was learned with the set, if it was; without augmentation."""
    config, count = distilled.config, len(distilled.images)
    if distilled.train_steps is not None:
        return {
            "kind": "adam",
            "steps": distilled.train_steps,
            "batch_size": min(config["batch_syn"] or count, count),
            "lr": config["lr_adam"],
        }
    if distilled.step_lrs is not None:
        batches = batches_in_order(
            len(distilled.class_names), distilled.ipc, config["distill_steps"]
        )
        return {
            "kind": "learned_steps",
            "rates": distilled.step_lrs.tolist(),
            "batches": [batch.tolist() for batch in batches],  # again from the first, when used up
            "momentum": 0.0,
            "weight_decay": 0.0,
        }
    return None
