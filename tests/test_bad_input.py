"""Flags and YAML under generated input: what is valid goes round, all else is a UserError."""

import string
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.fields import FLOAT_LIMIT, INT_LIMIT
from utils.config.resolve import resolve
from utils.core.errors import UserError
from utils.options import BufferOptions, DistillOptions, EvalOptions

OPTIONS = [BufferOptions, DistillOptions, EvalOptions]
FLAGS = sorted({f"--{field.name}" for kind in OPTIONS for field in fields(kind)})
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=30)  # no argument holds a NUL
SPECIAL = st.sampled_from(["nan", "inf", "1e999", "-1", "", "--", "-", "=", "\n", "1e30", "9" * 99])
few = settings(max_examples=25, deadline=None, derandomize=True)


def values(field):
    """Valid values of an option."""
    one = single_values(field)
    return st.lists(one, min_size=1, max_size=3) if "list" in str(field.type) else one


def single_values(field):
    meta = field.metadata
    if meta["choices"] is not None:
        return st.sampled_from(meta["choices"])
    if "bool" in str(field.type):
        return st.booleans()
    low, above, high = meta["minimum"], meta["above"], meta["maximum"]
    if "int" in str(field.type):
        return st.integers(low, INT_LIMIT - 1 if high is None else high)
    if "float" in str(field.type):
        return st.floats(
            low if above is None else above,
            FLOAT_LIMIT if high is None else high,
            exclude_min=above is not None,
        )
    if meta["check"] is not None:
        return st.lists(st.sampled_from("color crop flip".split()), min_size=1).map("_".join)
    return st.text(string.printable, max_size=20)


def some_values(kind):
    """Valid values of some of the options, by name."""
    return st.fixed_dictionaries({}, optional={f.name: values(f) for f in fields(kind)})


def read(kind, argv=(), text=None):
    """The options that a command line and the text of a YAML file give."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "case.yaml")
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = resolve(
            kind, argv, description="", find_yaml=lambda given: path if text is not None else None
        )
    return found.options


def as_flags(given):
    for name, value in given.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


def refuses_in_one_line(read_it, *parts):
    """Whether it raises a UserError: of one line that holds one of the parts."""
    try:
        read_it()
    except UserError as error:
        said = " ".join(str(error).splitlines())
        assert said
        assert not parts or any(part in said for part in parts)
        return True
    except SystemExit as stop:  # --help
        assert stop.code == 0
    return False


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(data=st.data())
def test_what_is_valid_comes_back_from_yaml(kind, data):
    options = replace(kind(), **data.draw(some_values(kind)))
    written = {name: value for name, value in vars(options).items() if value is not None}
    assert read(kind, text=yaml.safe_dump(written)) == options


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(data=st.data())
def test_what_is_valid_comes_back_from_flags(kind, data):
    given = data.draw(some_values(kind))
    assert read(kind, list(as_flags(given))) == replace(kind(), **given)


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(data=st.data())
def test_the_command_line_beats_yaml_beats_the_default(kind, data):
    in_yaml, on_line = data.draw(some_values(kind)), data.draw(some_values(kind))
    expected = replace(kind(), **{**in_yaml, **on_line})
    assert read(kind, list(as_flags(on_line)), yaml.safe_dump(in_yaml)) == expected


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(data=st.data())
def test_any_command_line_is_read_or_refused(kind, data):
    words = st.one_of(TEXTS, SPECIAL, st.sampled_from(FLAGS), st.integers().map(str))
    joined = st.tuples(st.sampled_from(FLAGS), words).map("=".join)
    argv = data.draw(st.lists(st.one_of(words, joined), max_size=5))
    refuses_in_one_line(lambda: read(kind, argv))


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(data=st.data())
def test_a_bad_value_is_refused_by_name(kind, data):
    flag, value = data.draw(st.sampled_from(FLAGS)), data.draw(st.one_of(TEXTS, SPECIAL))
    refuses_in_one_line(lambda: read(kind, [f"{flag}={value}"]), flag, value)


@pytest.mark.parametrize("value", ["--", "-", "=", "", " "])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_word_that_argparse_may_take_for_its_own_stays_one(kind, value):
    for field in fields(kind):
        try:
            found = getattr(read(kind, [f"--{field.name}={value}"]), field.name)
        except UserError as error:
            assert field.name in str(error)
        else:
            assert found == value


@few
@given(text=st.one_of(st.text(), st.binary(), st.text("[]{}:-&*!a1\n \t'\"|>?%#", max_size=40)))
def test_any_yaml_is_read_or_refused(text):
    encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    refuses_in_one_line(lambda: read(DistillOptions, text=encoded), "case.yaml")


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates())
NESTED = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=5
)


@few
@given(name=st.sampled_from([field.name for field in fields(DistillOptions)]), value=NESTED)
def test_any_value_in_yaml_is_read_or_refused(name, value):
    text = yaml.safe_dump({name: value})
    refuses_in_one_line(lambda: read(DistillOptions, text=text), f"case.yaml: {name}")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "- " * 20_000,
        "".join(f"{' ' * n}a:\n" for n in range(2_000)),
        f"a: {'[' * 5_000}{']' * 5_000}",
        "ipc: &a [*a]",
        "a: &a0 x\n" + "".join(f"b{n}: &a{n + 1} [{f'*a{n},' * 9}]\n" for n in range(9)),
        f"ipc: 0x{'f' * 5000}",
        f"ipc: {'9' * 5000}",
        "ipc: !!python/object/apply:os.abort []",
        "ipc: 2001-99-99",
        "? [a]\n: 1",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml_is_refused_by_name(text):
    assert refuses_in_one_line(lambda: read(DistillOptions, text=text), "case.yaml")
