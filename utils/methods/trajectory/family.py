"""ATT and its relatives: one method, told apart by its flags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from utils.compute.cost import NetworkCost
from utils.core.errors import UserError
from utils.data.dataset import ImageDataset
from utils.data.real_images import class_labels
from utils.experts.buffer import ExpertBuffer
from utils.experts.features import ExpertFeatures
from utils.methods.base import Learned, MethodSpec, Trajectories, Work, real_or_noise
from utils.methods.trajectory.labels import (
    images_that_experts_get_right,
    logits_of_right_experts,
)
from utils.methods.trajectory.method import TrajectoryMatching
from utils.methods.trajectory.options import TrajectoryOptions, title
from utils.methods.trajectory.tuning import find_lengths, find_rates, stalled
from utils.methods.unroll.work import count_work


def _initial(
    options: Any, data: ImageDataset, experts: ExpertBuffer
) -> tuple[Tensor, Tensor | None]:
    """Begin with the images of --pix_init and, where labels are learned, what experts say."""
    if options.pix_init != "samples_predicted_correctly" and not options.soft_labels:
        return real_or_noise(options, data, experts)
    features = ExpertFeatures.of(experts, options.model, data)
    if options.pix_init == "samples_predicted_correctly":
        train = data.require_train()
        chosen = images_that_experts_get_right(data, options.ipc, features, options.seed)
        images = train.images[chosen.to(train.images.device)]
    else:
        images = real_or_noise(options, data, experts)[0]
    if not options.soft_labels:
        return images, None
    labels = class_labels(data.num_classes, options.ipc, images.device)
    return images, logits_of_right_experts(features, images, labels)


def label_form(options: Any) -> str | None:
    """What learned labels are."""
    return "logits" if options.soft_labels else None


def _learned(options: Any, images: Tensor, soft: Tensor | None) -> Sequence[Learned]:
    labels = (
        []
        if soft is None
        else [Learned("labels", soft, options.lr_y, "lr_y", momentum=options.mom_y)]
    )
    return [
        Learned("images", images, options.lr_img, "lr_img", bound=options.max_update),
        Learned(
            "syn_lr",
            images.new_tensor(options.lr_teacher),
            options.lr_lr,
            "lr_lr",
            positive=True,
            log=options.log_syn_lr,
            bound=options.max_update if options.log_syn_lr else None,
            start=("lr_teacher", TrajectoryOptions.lr_teacher),  # that of the experts
        ),
        *labels,
    ]


def count_matching(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of an outer step; see `count_work`."""
    return count_work(
        cost,
        images=classes * options.ipc,
        batch_syn=options.batch_syn,
        syn_steps=options.syn_steps,
        students=options.trajectories,
        students_flag="trajectories",
        processes=processes,
    )


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    """Look at flags that may contradict each other: of start epochs and of soft labels."""
    _ = options.starts
    for name in ("lr_y", "mom_y"):
        if by_hand(name) and not options.soft_labels:
            raise UserError(f"--{name} is a setting of learned labels: give --soft_labels, too")
    if options.start_epochs is not None and by_hand("max_start_epoch"):
        raise UserError("--start_epochs and --max_start_epoch bound the same: give one of them")


def _check_datm(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.start_epochs is None:
        raise UserError(
            f"--method {options.method} draws start epochs from a range of its own: give "
            "--start_epochs FROM TO, or a --config with them"
        )
    _check(options, by_hand)


def _check_experts(options: Any, experts: Trajectories) -> None:
    """See that the experts are as long as the segments that are drawn from them."""
    last_start, last_epoch = options.starts.end - 1, options.last_epoch
    if last_epoch > experts.epochs:
        bound = "max_start_epoch" if options.start_epochs is None else "start_epochs to"
        raise UserError(
            f"--{bound} {last_start + 1}: start epoch {last_start} + --expert_epochs "
            f"{options.expert_epochs} = {last_epoch} is beyond the {experts.epochs} epochs of the "
            f"experts in {experts.folder}; lower one of them, or train longer experts in another "
            f"--buffer_path: --train_epochs {last_epoch}"
        )


def _relative(summary: str, check: Any = _check, **presets: Any) -> MethodSpec:
    return MethodSpec(
        summary=summary,
        options=TrajectoryOptions,
        presets=presets,
        title=title,
        build=TrajectoryMatching.build,
        learned=_learned,
        count_work=count_matching,
        syn_lr=lambda options: options.lr_teacher,
        if_not_finite="the matching loss is not finite: "
        "lower --lr_img, --lr_lr, --lr_teacher or --syn_steps",
        needs_experts=True,
        initial=_initial,
        label_form=label_form,
        find_lengths=find_lengths,
        find_rates=find_rates,
        stalled=stalled,
        check=check,
        check_experts=_check_experts,
    )


DATM: Mapping[str, Any] = {
    "length": "fixed",
    "flat": True,
    "soft_labels": True,
    "pix_init": "samples_predicted_correctly",
    "skip_above": 1.0,
}

FAMILY: Mapping[str, MethodSpec] = {
    "att": _relative("match the student at its step nearest to the expert's target"),
    "mtt": _relative("match it at its last step", length="fixed"),
    "ftd": _relative("mtt on experts trained by buffer.py --flat", length="fixed", flat=True),
    "pp": _relative(
        "mtt without the parameters unlike the target's", length="fixed", prune_threshold=0.5
    ),
    "tesla": _relative("mtt by an approximate gradient", length="fixed", gradient="tesla"),
    "datm": _relative(
        "ftd from late or early start epochs, with soft labels that experts begin",
        _check_datm,
        **DATM,
    ),
    "pad": _relative(
        "datm on experts trained by buffer.py --easy_first, without the shallow parameters",
        _check_datm,
        easy_first=True,
        depth_ratio=0.25,
        **DATM,
    ),
}
