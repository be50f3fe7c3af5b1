"""Options of a script: one dataclass declares flags, YAML keys, types, defaults, checks and help.

Precedence: command line, then the YAML file, then the default. argparse of the standard library
does the parsing; this file adds the field's spellings of booleans and the memory of where a value
came from.
"""

import argparse
import dataclasses
import difflib
import io
import math
import os
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
import yaml

from utils import distributed, interruption
from utils.errors import UserError

T = TypeVar("T")

FLAG, DEFAULT = "flag", "default"
SECONDS_FOR_MAIN = 5
INT_LIMIT, FLOAT_LIMIT = 2**31, torch.finfo(torch.float32).max
METAVARS = {int: "N", float: "X", str: "NAME"}
SHOWN = 80  # characters of a bad value
RECORDS = ("experts", "environment")  # in a run's own config.yaml, beside its options
CONFIGS = Path(__file__).parent.parent / "configs"


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
) -> Any:
    """A field of an options dataclass; `minimum` and `maximum` are allowed, `above` is not.

    `check` raises ValueError for a value that is no good, its message naming the choices.
    `may_change` marks what does not alter a result, so that it may differ between the calls of one
    run. With `auto` the word auto may be written for None.
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
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Resolved(Generic[T]):
    """The final options and, per name, their source: "flag", "default" or the YAML file's path."""

    options: T
    sources: dict[str, str]

    def given_by_hand(self, name: str) -> bool:
        return self.sources[name] == FLAG

    def set(self, name: str, value: Any, source: str) -> None:
        """Replace one value, remembering where the new one came from."""
        self.options = dataclasses.replace(self.options, **{name: value})  # type: ignore[type-var]
        self.sources[name] = source

    def table(self) -> str:
        """One aligned line per option: name, value, and the source where it is not the default."""
        lines = []
        for name, value in dataclasses.asdict(self.options).items():  # type: ignore[call-overload]
            source = self.sources[name]
            lines.append(f"  {name:18} {value!s:34} {'' if source == DEFAULT else source}".rstrip())
        return "\n".join(lines)


def resolve(
    options: type[T],
    argv: Sequence[str],
    *,
    description: str,
    find_yaml: Callable[[Mapping[str, Any]], Path | None] = lambda given: None,
) -> Resolved[T]:
    """Parse `argv` and the YAML file into an `options` object.

    `find_yaml` gets the values given as flags and names the YAML file, or None for none.
    Raises UserError for an unknown flag or key and for a value of a wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # which argparse would leave out
            raise UserError(f"{word}: '--' is no value")
    given = vars(_parser(options, description).parse_args(argv))
    for name, value in given.items():
        _check(fields[name], value, f"--{name}")
    path = find_yaml(given)
    from_yaml = _read_yaml(path, fields, _types(options)) if path is not None else {}
    for name, value in from_yaml.items():
        _check(fields[name], value, f"{path}: {name}")
    sources = {
        name: FLAG if name in given else str(path) if name in from_yaml else DEFAULT
        for name in fields
    }
    return Resolved(options(**{**from_yaml, **given}), sources)


def packaged_yaml(dataset: str, name: str) -> Path | None:
    """configs/<dataset>/<name>.yaml of this repository, or None where it has none."""
    path = CONFIGS / dataset / f"{name}.yaml"
    return Path(os.path.relpath(path)) if path.exists() else None


def nearest_row(dataset: str, ipc: int) -> Path | None:
    """configs/<dataset>/ipc<k>.yaml with the k nearest to `ipc`, the smaller on a tie."""
    names = [path.stem for path in (CONFIGS / dataset).glob("ipc*.yaml")]
    rows = [int(name[3:]) for name in names if name[3:].isdecimal()]
    if not rows:
        return None
    return packaged_yaml(dataset, f"ipc{min(sorted(rows), key=lambda row: abs(row - ipc))}")


def check_unchanged(
    before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path, instead: str
) -> None:
    """Refuse to go on with `where`, begun with the values `before`, under other values.

    UserError names the first that differs, with both values; `instead` is the flag that chooses
    another place. A setting that `before` does not know yet had no other value than the default.
    """
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{where} was begun with {name}={before[name]}, not {value}: "
                f"pass that value or another {instead}"
            )


def fixed_values(options: Any) -> dict[str, Any]:
    """The options that alter a result, by name."""
    fields = dataclasses.fields(options)
    return {f.name: getattr(options, f.name) for f in fields if not f.metadata["may_change"]}


def run_script(main: Callable[[Sequence[str]], int]) -> int:
    """Call `main` with the command line; a UserError becomes one line on stderr and status 2,
    memory that runs out one line and status 1, a signal that asks to end a line with the command
    that continues and status 130 or 143.

    Of several processes that make the same mistake the first one says so: torchrun ends the others
    while they wait. A process that fails leaves at once, without waiting for the others.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows lines as they come; a name that is no text in its encoding is escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    script = Path(sys.argv[0]).name
    interruption.listen()
    try:
        return main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_MAIN)
        status, message = 2, f"{script}: error: {' '.join(str(error).splitlines())}"
    except (Exception, interruption.Interrupted) as error:
        if interruption.asked():  # whatever broke then, broke off
            status = interruption.status()
            message = f"{script}: interrupted; to continue: {interruption.command()}"
        elif _is_out_of_memory(error):
            status = 1
            message = (
                f"{script}: out of memory: lower --micro_batch, --experts_at_once or "
                "--eval_at_once, or leave out --load_all"
            )
        elif distributed.under_torchrun():
            status, message = 1, traceback.format_exc()
        else:
            raise
    if distributed.is_main() or not interruption.asked():
        print(message, file=sys.stderr, flush=True)
    if distributed.under_torchrun():
        os._exit(status)
    return status


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of the host, which torch reports without a type of its own."""
    host = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return host or isinstance(error, torch.OutOfMemoryError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def _types(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options)


def _parser(options: type, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = _types(options)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        title, alias = field.metadata["group"], field.metadata["alias"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flags = [f"--{field.name}", *([f"--{alias}"] if alias else [])]
        _add_argument(groups[title], field, hints[field.name], flags)
    return parser


def _add_argument(group: Any, field: dataclasses.Field, hint: Any, flags: list[str]) -> None:
    kind, is_list = _kind(hint)
    keywords: dict[str, Any] = {"dest": field.name, "type": _converter(kind, field)}
    if kind is bool:
        keywords |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    elif is_list:
        keywords |= {"nargs": "+", "metavar": METAVARS[kind]}
    else:
        keywords["metavar"] = METAVARS[kind]
    group.add_argument(*flags, help=_help(field), **keywords)
    if kind is bool and not field.name.startswith("no_"):
        group.add_argument(
            f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
        )


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    choices = field.metadata["choices"]
    # A long list of choices is named by the error message instead.
    shown = f" [{', '.join(choices)}]" if choices and len(choices) <= 10 else ""
    default = "auto" if field.metadata["auto"] else _default(field)
    if default is None:
        return text + shown
    value = " ".join(default) if isinstance(default, list) else default
    return f"{text}{shown} (default: {value})"


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _kind(hint: Any) -> tuple[type, bool]:
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
    """Whole numbers, also written as 1e4, as people do for iterations."""
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


def _quoted(value: Any) -> str:
    """`value` for a message, the middle of a long one left out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return "a value too long to show"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def _converter(kind: type, field: dataclasses.Field) -> Callable[[Any], Any]:
    convert, noun = _CONVERSIONS[kind]
    if field.metadata["auto"]:
        noun += " or auto"

    def checked(value: Any) -> Any:
        if field.metadata["auto"] and value == "auto":
            return None
        try:
            return convert(value)
        except OverflowError:
            raise argparse.ArgumentTypeError(f"{_quoted(value)} is too large") from None
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"{_quoted(value)} is not {noun}") from None

    return checked


def _check(field: dataclasses.Field, value: Any, name: str) -> None:
    meta = field.metadata
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if meta["choices"] is not None and item not in meta["choices"]:
            raise UserError(
                f"{name}: unknown value {_quoted(item)}; choices: {', '.join(meta['choices'])}"
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


def _read_yaml(
    path: Path, fields: Mapping[str, dataclasses.Field], hints: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    values = {}
    for record in RECORDS:
        content.pop(record, None)
    aliases = {field.metadata["alias"]: name for name, field in fields.items()}
    for written, value in content.items():
        key = str(aliases.get(written, written))
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=3) or list(fields)
            raise UserError(f"{path}: unknown key {_quoted(written)}; choices: {', '.join(close)}")
        values[key] = _from_yaml(value, hints[key], fields[key], f"{path}: {key}")
    return values


def _from_yaml(value: Any, hint: Any, field: dataclasses.Field, name: str) -> Any:
    kind, is_list = _kind(hint)
    if value is None:
        if isinstance(hint, types.UnionType):
            return None
        raise UserError(f"{name} has no value")
    if isinstance(value, bool) and "on" in (field.metadata["choices"] or ()):
        value = "on" if value else "off"  # YAML reads these two words as booleans
    try:
        if is_list:
            return [
                _converter(kind, field)(item)
                for item in (value if isinstance(value, list) else [value])
            ]
        if isinstance(value, list | dict):
            raise argparse.ArgumentTypeError(f"{_quoted(value)} is not a single value")
        return _converter(kind, field)(value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
