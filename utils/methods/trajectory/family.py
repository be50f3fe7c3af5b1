"""ATT and its relatives: one method, told apart by its flags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from utils.core.errors import UserError
from utils.methods.base import Learned, MethodSpec, Trajectories
from utils.methods.trajectory.method import TrajectoryMatching
from utils.methods.trajectory.options import TrajectoryOptions, title
from utils.methods.trajectory.tuning import find_lengths, find_rates, stalled
from utils.methods.trajectory.work import count_work


def _learned(options: Any, images: Tensor) -> Sequence[Learned]:
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
    ]


def _check(options: Any, by_hand: Callable[[str], bool]) -> None:
    """Look at the flags of start epochs, which may contradict each other."""
    _ = options.starts
    if options.start_epochs is not None and by_hand("max_start_epoch"):
        raise UserError("--start_epochs and --max_start_epoch bound the same: give one of them")


def _check_datm(options: Any, by_hand: Callable[[str], bool]) -> None:
    if options.start_epochs is None:
        raise UserError(
            "--method datm draws start epochs from a range of its own: give --start_epochs FROM "
            "TO, or a --config with them"
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
        count_work=count_work,
        syn_lr=lambda options: options.lr_teacher,
        if_not_finite="the matching loss is not finite: "
        "lower --lr_img, --lr_lr, --lr_teacher or --syn_steps",
        needs_experts=True,
        find_lengths=find_lengths,
        find_rates=find_rates,
        stalled=stalled,
        check=check,
        check_experts=_check_experts,
    )


FAMILY: Mapping[str, MethodSpec] = {
    "att": _relative("match the student at its step nearest to the expert's target"),
    "mtt": _relative("match it at its last step", length="fixed"),
    "ftd": _relative("mtt on experts trained by buffer.py --flat", length="fixed", flat=True),
    "pp": _relative(
        "mtt without the parameters unlike the target's", length="fixed", prune_threshold=0.5
    ),
    "tesla": _relative("mtt by an approximate gradient", length="fixed", gradient="tesla"),
    "datm": _relative(
        "ftd from late or early start epochs", _check_datm, length="fixed", flat=True
    ),
}
