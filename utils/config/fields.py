"""One option of a script: its declaration, type, range and choices."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch

from utils.core.errors import UserError

INT_LIMIT, FLOAT_LIMIT = 2**31, torch.finfo(torch.float32).max
METAVARS = {int: "N", float: "X", str: "NAME"}
SHOWN = 80  # characters of a bad value


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Iterable[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    alias: str | None = None,
    check: Callable[[Any], object] | None = None,
    may_change: bool = False,
    auto: bool = False,
    found: bool | str = False,
    unless: str | None = None,
    noun: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a field of an options dataclass; `minimum` and `maximum` are allowed, `above` is not.

    `check` raises ValueError for a bad value, with the choices in its message. `may_change` marks
    what does not alter a result, so it may differ between the calls of one run. With `auto` the
    word auto may be written for None. What is `found` follows from the data where neither a flag
    nor a file gives it, or the flag that `found` names; the default is then only what a plan
    without data assumes. It is of no use where the flag `unless` has a value. `noun` says what a
    value is, where its type says too little. What is `positional` is given without a flag.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": tuple(choices) if choices is not None else None,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "alias": alias,
        "check": check,
        "may_change": may_change,
        "auto": auto,
        "found": found,
        "unless": unless,
        "noun": noun,
        "positional": positional,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def scalar_type(hint: Any) -> tuple[type, bool]:
    """The scalar type of an annotation and whether it is a list: `int | None` -> (int, False)."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _to_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(value)
    return text in ("true", "1", "yes")


def _to_int(value: Any) -> int:
    """Convert a whole number, which may be written as 1e4, as people do for iterations."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(value)
    if abs(number) >= INT_LIMIT:
        raise OverflowError(value)
    return int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    if abs(number) > FLOAT_LIMIT:
        raise OverflowError(value)
    return number


_CONVERSIONS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_to_bool, "true or false"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a finite number"),
    str: (str, "text"),
}


def quoted(value: Any) -> str:
    """Write `value` for a message, without the middle of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return "a value too long to show"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def converter(kind: type, field: dataclasses.Field) -> Callable[[Any], Any]:
    convert, noun = _CONVERSIONS[kind]
    noun = field.metadata["noun"] or noun
    if field.metadata["auto"]:
        noun += " or auto"

    def checked(value: Any) -> Any:
        if field.metadata["auto"] and value == "auto":
            return None
        try:
            return convert(value)
        except OverflowError:
            raise argparse.ArgumentTypeError(f"{quoted(value)} is too large") from None
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"{quoted(value)} is not {noun}") from None

    return checked


def check_value(field: dataclasses.Field, value: Any, name: str) -> None:
    meta = field.metadata
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if meta["choices"] is not None and item not in meta["choices"]:
            raise UserError(
                f"{name}: unknown value {quoted(item)}; choices: {', '.join(meta['choices'])}"
            )
        if meta["minimum"] is not None and item < meta["minimum"]:
            raise UserError(f"{name} must be at least {meta['minimum']}, not {item}")
        if meta["maximum"] is not None and item > meta["maximum"]:
            raise UserError(f"{name} must be at most {meta['maximum']}, not {item}")
        if meta["above"] is not None and item <= meta["above"]:
            raise UserError(f"{name} must be above {meta['above']}, not {item}")
        if meta["check"] is not None:
            try:
                meta["check"](item)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
