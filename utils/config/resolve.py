"""Options of a script: one dataclass declares flags, YAML keys, types, defaults, checks and help.

Precedence: command line, then the YAML file, then the default. argparse of the standard library
does the parsing; this file adds the field's spellings of booleans and the memory of where a value
came from.
"""

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from utils.config.fields import METAVARS, check_value, converter, quoted, scalar_type
from utils.config.foreign import FOREIGN, translate
from utils.core.errors import UserError
from utils.core.script import Parser

T = TypeVar("T")
YAML_LIMIT = 2**20  # characters
# What is known by now -> a source, and the values that it gives instead of defaults
Presets = Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]]

FLAG, DEFAULT = "flag", "default"
FOUND = "found on the data"
RECORDS = ("experts", "data", "environment")  # in a run's own config.yaml, beside its options
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass
class Resolved(Generic[T]):
    """The final options and, per name, their source: "flag", "default" or the YAML file's path."""

    options: T
    sources: dict[str, str]

    @classmethod
    def of(cls, options: T) -> "Resolved[T]":
        """Take `options` made in Python: what differs from the defaults was given by hand."""
        defaults = type(options)()
        return cls(
            options,
            {
                name: DEFAULT if value == getattr(defaults, name) else FLAG
                for name, value in vars(options).items()
            },
        )

    def given_by_hand(self, name: str) -> bool:
        return self.sources[name] == FLAG

    def is_open(self, name: str) -> bool:
        """Whether the value of `name` is still to be found on the data: nobody has given one."""
        fields = {field.name: field for field in dataclasses.fields(self.options)}  # type: ignore[arg-type]
        found, unless = (fields[name].metadata[key] for key in ("found", "unless"))
        is_found = self.is_open(found) if isinstance(found, str) else found
        is_of_use = unless is None or getattr(self.options, unless) is None
        return self.sources[name] == DEFAULT and is_found and is_of_use

    @property
    def open_names(self) -> list[str]:
        return [name for name in self.sources if self.is_open(name)]

    def set(self, name: str, value: Any, source: str) -> None:
        """Replace one value, remembering where the new one came from."""
        self.options = dataclasses.replace(self.options, **{name: value})  # type: ignore[type-var]
        self.sources[name] = source

    def table(self, *, whole: bool = False, hidden: Collection[str] = ()) -> str:
        """One aligned line per option that is not at its default, or with `whole` for every one:
        name, value, and the source where it is not the default. The `hidden` ones are left out.
        """
        lines = []
        for name, value in dataclasses.asdict(self.options).items():  # type: ignore[call-overload]
            source = self.sources[name]
            if name not in hidden and (whole or source != DEFAULT):
                lines.append(f"  {name:18} {value!s:34} {source}".removesuffix(DEFAULT).rstrip())
        return "\n".join(lines)


def resolve(
    options: type[T],
    argv: Sequence[str],
    *,
    description: str,
    find_yaml: Callable[[Mapping[str, Any]], Path | None] = lambda given: None,
) -> Resolved[T]:
    """Parse `argv` and the YAML file into an `options` object.

    `find_yaml` gets the values given as flags and names the YAML file, or None for none. The class
    may have a static method `presets`: it gets the values of both, and returns a source with the
    values that stand in for defaults.
    Raises UserError for an unknown flag or key and for a value of a wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # which argparse would leave out
            raise UserError(f"{word}: '--' is no value")
    hints = typing.get_type_hints(options)
    given = vars(_parser(options, description).parse_args(argv))
    given = _without_foreign(given, given.keys() - fields.keys(), fields, hints, prefix="--")
    for name, value in given.items():
        check_value(fields[name], value, f"--{name}")
    path = find_yaml(given)
    from_yaml = _read_yaml(path, fields, hints) if path is not None else {}
    for name, value in from_yaml.items():
        check_value(fields[name], value, f"{path}: {name}")
    find_presets: Presets = getattr(options, "presets", lambda known: ("", {}))
    origin, preset = find_presets(from_yaml | given)
    sources = dict.fromkeys(fields, DEFAULT) | dict.fromkeys(preset, origin)
    sources |= dict.fromkeys(from_yaml, str(path)) | dict.fromkeys(given, FLAG)
    return Resolved(options(**{**preset, **from_yaml, **given}), sources)


def _without_foreign(
    given: Mapping[str, Any],
    foreign: Collection[str],
    fields: Mapping[str, dataclasses.Field],
    hints: Mapping[str, Any],
    *,
    prefix: str,
) -> dict[str, Any]:
    """Translate what of `given` is `foreign`: other codes call it otherwise
    (`utils/config/foreign.py`). `prefix` stands before names in messages.
    """
    labels = {name: f"{prefix}{name}" for name in given if name in foreign}
    if not labels:
        return dict(given)
    written = {
        name: [str(item) for item in (value if isinstance(value, list) else [value])]
        for name, value in given.items()
    }
    own, replaced = translate(written, labels)
    kept = {name: value for name, value in given.items() if name not in replaced}
    for name, words in own.items():
        if name not in fields:
            raise UserError(f"{', '.join(labels.values())}: {name} is not a setting of this script")
        kind, is_list = scalar_type(hints[name])
        if not is_list and len(words) != 1:
            raise UserError(f"{prefix}{name} takes one value, not {len(words)}")
        try:
            items = [converter(kind, fields[name])(word) for word in words]
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{prefix}{name}: {error}") from None
        value = items if is_list else items[0]
        if kept.setdefault(name, value) != value:
            raise UserError(f"{prefix}{name} is given twice, as {kept[name]} and as {value}")
    return kept


def packaged_yaml(dataset: str, name: str) -> Path | None:
    """configs/<dataset>/<name>.yaml of this repository, or None where it has none."""
    path = CONFIGS / dataset / f"{name}.yaml"
    return shortest(path) if path.exists() else None


def shortest(path: Path) -> Path:
    """`path` from the current folder, where it is on the same drive (Windows has several)."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:
        return path


def nearest_row(dataset: str, ipc: int, method: str | None = None) -> Path | None:
    """configs/<dataset>/ipc<k>.yaml with the k nearest to `ipc`, the smaller on a tie; of another
    method than ATT ipc<k>_<method>.yaml.
    """
    suffix = f"_{method}" if method else ""
    names = [path.stem for path in (CONFIGS / dataset).glob(f"ipc*{suffix}.yaml")]
    numbers = [name.removeprefix("ipc").removesuffix(suffix) for name in names]
    rows = sorted(int(number) for number in numbers if number.isdecimal())
    if not rows:
        return None
    nearest = min(rows, key=lambda row: abs(row - ipc))
    return packaged_yaml(dataset, f"ipc{nearest}{suffix}")


def check_unchanged(
    before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path, instead: str
) -> None:
    """Raise UserError if a setting that affects results differs from those `where` was begun with.

    It names the first one with both values; `instead` is the flag that chooses another place. A
    setting that `before` does not have yet had its default.
    """
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{where} was begun with {name}={before[name]}, not {value}: "
                f"pass that value or another {instead}"
            )


def fixed_values(options: Any) -> dict[str, Any]:
    """Collect the options that alter a result, by name."""
    fields = dataclasses.fields(options)
    return {f.name: getattr(options, f.name) for f in fields if not f.metadata["may_change"]}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def _parser(options: type, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = typing.get_type_hints(options)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        title, alias = field.metadata["group"], field.metadata["alias"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flags = [f"--{name}" for name in (field.name, alias) if name]
        flags = [field.name] if field.metadata["positional"] else flags
        _add_argument(groups[title], field, hints[field.name], flags)
    for name in FOREIGN.keys() - hints.keys():
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser


def _add_argument(group: Any, field: dataclasses.Field, hint: Any, flags: list[str]) -> None:
    kind, is_list = scalar_type(hint)
    keywords: dict[str, Any] = {"type": converter(kind, field)}
    if field.metadata["positional"]:
        group.add_argument(*flags, help=field.metadata["help"], **keywords)
        return
    keywords["dest"] = field.name
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
    default = "the row's, or found on the data" if field.metadata["found"] is True else default
    if default is None or "(default: " in text:
        return text + shown
    value = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text}{shown} (default: {value})"


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _read_yaml(
    path: Path, fields: Mapping[str, dataclasses.Field], hints: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(YAML_LIMIT + 1)  # a device may have no end
        content = yaml.safe_load(text) if len(text) <= YAML_LIMIT else None
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if len(text) > YAML_LIMIT:
        raise UserError(f"{path} is too long for a file of settings")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    values: dict[str, Any] = {}
    foreign = set()
    for record in RECORDS:
        content.pop(record, None)
    aliases = {field.metadata["alias"]: name for name, field in fields.items()}
    for written, value in content.items():
        key = str(aliases.get(written, written))
        # DATM's device is a list of numbers.
        if key in FOREIGN and (key not in fields or isinstance(value, list)):
            values[key] = [] if value is None else value
            foreign.add(key)
            continue
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=3) or list(fields)
            raise UserError(f"{path}: unknown key {quoted(written)}; choices: {', '.join(close)}")
        values[key] = _from_yaml(value, hints[key], fields[key], f"{path}: {key}")
    return _without_foreign(values, foreign, fields, hints, prefix=f"{path}: ")


def _from_yaml(value: Any, hint: Any, field: dataclasses.Field, name: str) -> Any:
    kind, is_list = scalar_type(hint)
    if value is None:
        if isinstance(hint, types.UnionType):
            return None
        raise UserError(f"{name} has no value")
    if isinstance(value, bool) and "on" in (field.metadata["choices"] or ()):
        value = "on" if value else "off"  # YAML reads these two words as booleans
    try:
        if is_list:
            return [
                converter(kind, field)(item)
                for item in (value if isinstance(value, list) else [value])
            ]
        if isinstance(value, list | dict):
            raise argparse.ArgumentTypeError(f"{quoted(value)} is not a single value")
        return converter(kind, field)(value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
