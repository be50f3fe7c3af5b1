"""The methods by name. To add one: a file beside this one with the class and its flags, and one
line here.
"""

from collections.abc import Mapping
from dataclasses import fields, make_dataclass
from typing import Any

from utils.config.foreign import FOREIGN, NoEffect
from utils.config.resolve import DEFAULT, FLAG
from utils.core.errors import UserError
from utils.methods.base import MethodSpec
from utils.methods.bptt import BPTT
from utils.methods.cafe import CAFE, CAFE_DSA
from utils.methods.dd import DD
from utils.methods.distribution import DM
from utils.methods.gradient_matching import DC, DSA
from utils.methods.kip import KIP
from utils.methods.label_solve import LABEL_SOLVE
from utils.methods.ld import LD
from utils.methods.trajectory.family import FAMILY

METHODS: dict[str, MethodSpec] = {
    **FAMILY,
    "dm": DM,
    "dc": DC,
    "dsa": DSA,
    "cafe": CAFE,
    "cafe_dsa": CAFE_DSA,
    "bptt": BPTT,
    "dd": DD,
    "ld": LD,
    "kip": KIP,
    "label_solve": LABEL_SOLVE,
}
DEFAULT_METHOD = "att"
OF_LEARNED_IMAGES = {"lr_img", "max_update", "ema_decay"}  # common flags

# The flags of all methods together, to be part of the options of a distillation.
MethodOptions: Any = make_dataclass(
    "MethodOptions",
    [],
    bases=tuple(dict.fromkeys(spec.options for spec in METHODS.values())),
    frozen=True,
)


def own_flags(method: str) -> set[str]:
    """The names of the flags that `method` declares."""
    return {field.name for field in fields(METHODS[method].options)}


def foreign_flags(method: str) -> set[str]:
    """The names of the flags that `method` has no use for: those that others declare and, where it
    does not learn the images, those of the images.
    """
    others = set().union(*map(own_flags, METHODS)) - own_flags(method)
    return others if METHODS[method].learns_images else others | OF_LEARNED_IMAGES


def check_own_flags(method: str, sources: Mapping[str, str]) -> None:
    """Raise UserError where a flag or a YAML file sets what `method` has no use for; what the codes
    of others take without effect gets a line.

    `sources` says of each option where its value is from.
    """
    for name in sorted(foreign_flags(method)):
        known = FOREIGN.get(name)
        if sources[name] != DEFAULT and isinstance(known, NoEffect):
            print(f"--{name}: no effect here, {known.because}")
        elif sources[name] != DEFAULT:
            given = f"--{name}" if sources[name] == FLAG else f"{name} in {sources[name]}"
            own = ", ".join(f"--{flag}" for flag in sorted(own_flags(method)))
            raise UserError(f"{given} is no setting of --method {method}, whose own are {own}")


def title(config: Mapping[str, Any]) -> str:
    """Name the method that a configuration amounts to, as tables do."""
    return METHODS[config.get("method", DEFAULT_METHOD)].title(config)


def check_same_method(before: str, now: str, *, where: str) -> None:
    """Refuse to go on with one method where another began. Relatives differ by their flags alone,
    which are compared themselves.
    """
    if METHODS[before].options is not METHODS[now].options:
        raise UserError(
            f"{where} was begun with --method {before}, not {now}: pass that method or another "
            "--run_name"
        )
