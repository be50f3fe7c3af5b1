"""The flags of trajectory matching."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.config.fields import option
from utils.core.errors import UserError
from utils.methods.trajectory.lengths import DISTANCES, LENGTH_POLICIES
from utils.methods.trajectory.starts import StartEpochs
from utils.methods.unroll.options import LabelOptions, StepsOptions

_EXPERTS, _SET, _MATCHING, _FILES = "experts", "synthetic set", "trajectory matching", "files"


@dataclass(frozen=True)
class TrajectoryOptions(StepsOptions, LabelOptions):
    flat: bool = option(False, "experts trained by buffer.py --flat (FTD)", group=_EXPERTS)
    easy_first: bool = option(
        False, "experts trained by buffer.py --easy_first (PAD)", group=_EXPERTS
    )
    expert_epochs: int = option(
        2,
        "N_T, epochs between an expert's start and target",
        group=_MATCHING,
        minimum=1,
        found=True,
    )
    max_start_epoch: int = option(
        20,
        "start epochs are drawn from 0 ... max_start_epoch - 1",
        group=_MATCHING,
        minimum=1,
        found=True,
        unless="start_epochs",
    )
    start_epochs: list[int] | None = option(
        None,
        "FROM TO: draw start epochs from FROM ... TO - 1 instead (DATM: late or early ones)",
        group=_MATCHING,
        minimum=0,
    )
    current_max_start_epoch: int | None = option(
        None,
        "start epochs are below this at first, and below TO from expansion_end_epoch on (DATM)",
        group=_MATCHING,
        minimum=1,
    )
    expansion_end_epoch: int = option(
        0,
        "outer steps until start epochs have their whole range (DATM)",
        group=_MATCHING,
        minimum=0,
    )
    soft_labels: bool = option(
        False,
        "learn what each image says of every class; it begins with the logits of the experts",
        group=_SET,
    )
    mom_y: float = option(0.9, "momentum of soft labels", group=_SET, minimum=0, alias="Momentum_y")
    skip_above: float | None = option(
        None,
        "take no outer step whose loss is above this: the student ended farther from its target "
        "than it began (DATM)",
        group=_MATCHING,
        above=0,
        alias="threshold",
    )
    length: str = option(
        "att",
        "how the student's length is chosen: the step nearest to the target, or syn_steps (MTT)",
        group=_MATCHING,
        choices=LENGTH_POLICIES,
    )
    distance: str = option(
        "l2",
        "distance by which att chooses: squared L2 (the paper) or L1 (the authors' code)",
        group=_MATCHING,
        choices=DISTANCES,
    )
    prune_threshold: float | None = option(
        None,
        "match only parameters whose similarity to the target's, 1 where equal, is at least this "
        "(PP)",
        group=_MATCHING,
        minimum=-1,
        maximum=1,
    )
    depth_ratio: float = option(
        0.0,
        "leave the first so many of the parameters, the shallow ones, out of the loss (PAD)",
        group=_MATCHING,
        minimum=0,
        maximum=0.99,
    )
    trajectories: int = option(
        1,
        "expert segments that one outer step averages over",
        group=_MATCHING,
        minimum=1,
        maximum=10_000,
    )
    max_files: int | None = option(
        None, "buffer files to use at most", group=_FILES, minimum=1, may_change=True
    )
    max_experts: int | None = option(
        None, "experts to use at most", group=_FILES, minimum=1, may_change=True
    )
    load_all: bool = option(
        False, "read all experts into memory at the start", group=_FILES, may_change=True
    )
    log_distances: int = option(
        0,
        "outer steps between logs of the student's whole distance curve (L1 and squared L2); 0 = "
        "never",
        group=_FILES,
        minimum=0,
        may_change=True,
    )

    @property
    def starts(self) -> StartEpochs:
        """The start epochs; UserError where the flags leave none, or contradict each other."""
        if self.start_epochs is not None and len(self.start_epochs) != 2:
            raise UserError(
                f"--start_epochs takes two numbers, FROM and TO, not {len(self.start_epochs)}"
            )
        first, end = self.start_epochs or (0, self.max_start_epoch)
        below, grown_at = self.current_max_start_epoch, self.expansion_end_epoch
        if (below is None) != (grown_at == 0):
            raise UserError(
                f"--current_max_start_epoch {below} and --expansion_end_epoch {grown_at}: give "
                "both or none"
            )
        if first >= end:
            raise UserError(f"--start_epochs {first} {end}: FROM must be below TO")
        if below is not None and not first < below <= end:
            raise UserError(
                f"--current_max_start_epoch {below} must be above {first} and at most {end}, the "
                "first and the last bound of start epochs"
            )
        return StartEpochs(end, first, below, grown_at)

    @property
    def last_epoch(self) -> int:
        """The last epoch that is a target: experts must have as many."""
        return self.starts.end - 1 + self.expert_epochs


def title(config: Mapping[str, Any]) -> str:
    """Name what a configuration amounts to: ATT, MTT, or what is added to it, as ATT + PP.

    DATM trains on FTD's experts and has soft labels, so both are part of it; PAD is DATM on experts
    trained easy-first, with its filter of parameters or, as at one image per class, without.
    """
    from_two, soft = config["start_epochs"] is not None, config.get("soft_labels", False)
    easy_first = config.get("easy_first", False)
    is_pad = from_two and soft and easy_first
    parts = {
        "ATT": config["length"] == "att",
        config["length"]: config["length"] not in ("att", "fixed"),  # a policy of one's own
        "FTD": config["flat"] and not from_two,
        "PAD": is_pad,
        "DATM": from_two and soft and not is_pad,
        "DATM, hard labels": from_two and not soft,
        "PP": config["prune_threshold"] is not None,
        "PAD's experts": easy_first and not is_pad,
        "PAD's depth": config.get("depth_ratio", 0) > 0 and not is_pad,
        "TESLA": config["gradient"] == "tesla",
        "soft labels": soft and not from_two,
    }
    return " + ".join(name for name, is_in in parts.items() if is_in) or "MTT"
