"""Flags of other codes (MTT, FTD, TESLA, DATM, PAD, ATT) that the scripts here do not have.

Their published command lines are pasted: what has no effect here is taken with a line, what has
another name is translated, and what belongs to a feature that is not here is refused by name. The
same holds for keys of their YAML files. A flag that a script declares itself is its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from utils.core.errors import UserError

Values = list[str]
# Names to the values that were given for them, as written
Written = Mapping[str, Values]


@dataclass(frozen=True)
class NoEffect:
    """Taken and left out; `because` says why that changes nothing."""

    because: str


@dataclass(frozen=True)
class NotHere:
    """Refused unless its value is one of `harmless`; `feature` names what it belongs to."""

    feature: str
    harmless: tuple[str, ...] = ("false",)


@dataclass(frozen=True)
class Translated:
    """Replaced: `into` makes own flags of it, from its name and all that was given, some of which
    it `replaces` too. ValueError says what does not go together.
    """

    into: Callable[[str, Written], Written]
    replaces: frozenset[str] = frozenset()


def _rho(name: str, given: Written) -> Written:
    """FTD's rho, which GSAM bounds from both sides, while the learning rate stays the same."""
    bounds = {tuple(given[each]) for each in ("rho_max", "rho_min") if each in given}
    if len(bounds) > 1:
        raise ValueError("rho stays the same here, so --rho_max and --rho_min must be equal")
    return {"flat": ["true"], "rho": given[name]}


def _easy_first(flag: str) -> Translated:
    """A setting of PAD's experts, which has no other here."""
    return Translated(lambda name, given: {"easy_first": ["true"], flag: given[name]})


def _drops(name: str, given: Written) -> Written:
    """PAD's two epochs, or two shares, are one list here."""
    stem = name.removesuffix("_first").removesuffix("_second")
    both = [f"{stem}_first", f"{stem}_second"]
    if not given.keys() >= {*both}:
        raise ValueError(f"give --{both[0]} and --{both[1]}")
    flag = {"rm_epoch": "drop_after", "rm_easy_ratio": "drop_easiest"}[stem]
    return {"easy_first": ["true"], flag: [value for each in both for value in given[each]]}


def _start_epochs(name: str, given: Written) -> Written:
    if "max_start_epoch" not in given:
        raise ValueError("give --max_start_epoch too: both are --start_epochs FROM TO here")
    return {"start_epochs": [*given[name], *given["max_start_epoch"]]}


def _no_dsa(name: str, given: Written) -> Written:
    if given[name] not in (["none"], ["None"]):
        raise ValueError("networks are augmented as in the distillation; --no_dsa goes without")
    return {"dsa": ["false"]}


def _whitened(name: str, given: Written) -> Written:
    """A set of another code is whitened; what is one of this code says it itself."""
    return {"space": ["zca"]} if given[name] in ([], ["True"], ["true"], ["1"]) else {}


_OF_THE_SET = NoEffect("the distilled set has it")
_TEXTURES = NotHere("distilling textures (MTT)")
_OF_TEXTURES = NoEffect("it is for --texture, which is not here")
_OF_ANOTHER_MODEL = NoEffect("it is for labels by another network, which are not here")

FOREIGN: Mapping[str, NoEffect | NotHere | Translated] = {
    # MTT, and all codes that begin with it
    "batch_real": NoEffect("real images are read at once"),
    "lr_init": NoEffect("syn_lr begins at --lr_teacher"),
    "force_save": NoEffect("pictures are saved at any --ipc"),
    "texture": _TEXTURES,
    "canvas_size": _OF_TEXTURES,
    "canvas_samples": _OF_TEXTURES,
    # FTD and DATM: experts by GSAM
    "rho_max": Translated(_rho),
    "rho_min": Translated(_rho),
    "adaptive": NotHere("GSAM that is not adaptive", harmless=("true",)),
    # TESLA
    "loss_type": NotHere("training experts by another loss than cross-entropy", harmless=("ce",)),
    "random_trajectory": NotHere("matching random networks instead of experts (TESLA)"),
    "teacher_label": NotHere("labels by the expert (TESLA)"),
    # DATM
    "min_start_epoch": Translated(_start_epochs, frozenset({"max_start_epoch"})),
    "Initialize_Label_With_Another_Model": NotHere("soft labels by another network (DATM)"),
    "Initialize_Label_Model": _OF_ANOTHER_MODEL,
    "Initialize_Label_Model_Dir": _OF_ANOTHER_MODEL,
    "Label_Model_Timestamp": _OF_ANOTHER_MODEL,
    "Initial_Step": NotHere("a number of student steps that grows (DATM)"),
    "learn_end_epoch": NotHere("a number of student steps that grows (DATM)"),
    "skip_first_eva": NoEffect("--eval_it 0 goes without evaluations"),
    "parall_eva": NoEffect("--eval_at_once trains several networks together"),
    "record_loss": NoEffect("every loss is logged"),
    "project": NoEffect("runs at Weights & Biases are in the project att"),
    "device": NoEffect("--device or CUDA_VISIBLE_DEVICES chooses the GPU"),
    # PAD: experts trained easy-first
    "sort_method": NoEffect("--easy_first ranks images by the EL2N of experts"),
    "init_ratio": _easy_first("easy_share"),
    "add_end_epoch": _easy_first("all_from"),
    "rm_epoch_first": Translated(_drops),
    "rm_epoch_second": Translated(_drops),
    "rm_easy_ratio_first": Translated(_drops),
    "rm_easy_ratio_second": Translated(_drops),
    "loss_ratio": NoEffect("--depth_ratio is the filter of parameters"),
    # Their evaluation
    "zca": Translated(_whitened),
    "lr_teacher": _OF_THE_SET,
    "no_aug": NoEffect("--no_dsa trains without augmentation"),
    "dsa_strategy": Translated(_no_dsa),
}


def translate(given: Written, labels: Mapping[str, str]) -> tuple[Written, set[str]]:
    """Turn the foreign ones of what was `given` into own flags, with a line for each; returns those
    and the names that they replace.

    `labels` has what each foreign one is called in messages. UserError where one is refused.
    """
    own: dict[str, Values] = {}
    replaced = set(labels)
    for name, label in labels.items():
        entry = FOREIGN[name]
        if isinstance(entry, NoEffect):
            print(f"{label}: no effect here, {entry.because}")
        elif isinstance(entry, NotHere):
            if [value.lower() for value in given[name]] not in [[each] for each in entry.harmless]:
                raise UserError(f"{label}: {entry.feature} is not here; leave it out")
            print(f"{label} {' '.join(given[name])}: no effect here, it is so anyway")
        else:
            try:
                made = entry.into(name, given)
            except ValueError as error:
                raise UserError(f"{label}: {error}") from None
            flags = " ".join(" ".join((f"--{flag}", *values)) for flag, values in made.items())
            print(f"{label}: taken as {flags}")
            own |= made
            replaced |= entry.replaces
    return own, replaced
