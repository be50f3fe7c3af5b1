"""Flags, YAML, defaults: precedence, spellings, errors; and the rows that are shipped."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.config.fields import option
from utils.config.resolve import (
    CONFIGS,
    check_unchanged,
    fixed_values,
    nearest_row,
    packaged_yaml,
    resolve,
)
from utils.core.errors import UserError
from utils.options import BufferOptions, DistillOptions, EvalOptions

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    steps: int = option(50, "steps", group="a", minimum=1, alias="number_of_steps")
    rate: float = option(0.5, "rate", group="a", above=0, maximum=1)
    zca: bool = option(False, "whiten", group="b")
    no_aug: bool = option(False, "no augmentation", group="b")
    size: int | None = option(None, "size", group="b")
    kind: str = option("x", "kind", group="b", choices=("x", "y"))
    names: list[str] | None = option(None, "names", group="b", choices=("p", "q"))
    at_once: int | None = option(None, "at once", group="c", minimum=1, auto=True, may_change=True)
    compile: str = option("auto", "compile", group="c", choices=("auto", "on", "off"))


def parse(*argv, yaml=None, tmp_path=None):
    path = None
    if yaml is not None:
        path = tmp_path / "row.yaml"
        path.write_text(yaml)
    return resolve(Options, argv, description="", find_yaml=lambda given: path)


def test_command_line_beats_yaml_beats_default(tmp_path):
    resolved = parse("--steps", "7", yaml="steps: 8\nrate: 0.25\n", tmp_path=tmp_path)
    assert resolved.options == Options(steps=7, rate=0.25)
    yaml = str(tmp_path / "row.yaml")
    assert (resolved.sources["steps"], resolved.sources["rate"]) == ("flag", yaml)
    assert resolved.sources["kind"] == "default"
    assert resolved.given_by_hand("steps")
    assert not resolved.given_by_hand("rate")
    table = {line.split()[0]: line for line in resolved.table(whole=True).splitlines()}
    assert yaml in table["rate"]
    assert "flag" in table["steps"]
    assert "default" not in table["kind"]
    given = [line.split()[0] for line in resolved.table(hidden=["rate"]).splitlines()]
    assert given == ["steps"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--zca"], True),
        (["--zca=True"], True),
        (["--zca", "true"], True),
        (["--zca=False"], False),
        (["--zca", "0"], False),
        (["--no_zca"], False),
    ],
)
def test_the_spellings_of_a_switch(argv, expected, tmp_path):
    assert parse(*argv, yaml=f"zca: {not expected}", tmp_path=tmp_path).options.zca is expected


def test_no_aug_means_what_it_says():
    assert parse("--no_aug").options.no_aug
    assert parse("--no_aug=True").options.no_aug
    assert not parse("--no_aug=False").options.no_aug


def test_values():
    assert parse("--steps=1e3").options.steps == 1000
    assert parse("--number_of_steps", "9").options.steps == 9
    assert parse("--rate=1e-07").options.rate == 1e-7
    assert parse("--names", "p", "q").options.names == ["p", "q"]
    assert parse().options.size is None


def test_yaml_numbers_in_the_notation_of_papers(tmp_path):
    assert parse(yaml="rate: 1e-7", tmp_path=tmp_path).options.rate == 1e-7  # YAML 1.1: a string
    assert parse(yaml="steps: 1e4", tmp_path=tmp_path).options.steps == 10_000
    assert parse(yaml="size: null", tmp_path=tmp_path).options.size is None


@pytest.mark.parametrize(("written", "value"), [("auto", None), ("4", 4), ("1e1", 10)])
def test_auto_means_no_value(written, value, tmp_path):
    assert (
        parse("--at_once", written, yaml="at_once: 7", tmp_path=tmp_path).options.at_once == value
    )
    resolved = parse(yaml=f"at_once: {written}", tmp_path=tmp_path)
    assert resolved.options.at_once == value
    assert resolved.sources["at_once"] == str(tmp_path / "row.yaml")


def test_auto_is_a_word_only_where_it_is_declared():
    assert parse().options.at_once is None
    with pytest.raises(UserError, match=r"'auto' is not a whole number \(see"):
        parse("--size", "auto")


@pytest.mark.parametrize("word", ["on", "off", "auto", "'on'", "true", "false"])
def test_on_and_off_are_words_in_yaml_too(word, tmp_path):
    """YAML 1.1 reads them as booleans."""
    expected = {"true": "on", "false": "off"}.get(word, word.strip("'"))
    assert parse(yaml=f"compile: {word}", tmp_path=tmp_path).options.compile == expected


def test_a_boolean_in_yaml_stays_one(tmp_path):
    options = parse(yaml="zca: on\nno_aug: off", tmp_path=tmp_path).options
    assert (options.zca, options.no_aug) == (True, False)


@pytest.mark.parametrize("name", ["experts_at_once"])
def test_the_speed_options_of_buffer(name):
    def read(*argv):
        return getattr(resolve(BufferOptions, argv, description="").options, name)

    assert read() is None
    assert read(f"--{name}", "auto") is None
    assert read(f"--{name}", "4") == 4
    for bad, reason in (("0", "at least 1, not 0"), ("x", "'x' is not a whole number or auto")):
        with pytest.raises(UserError, match=reason):
            read(f"--{name}", bad)


def test_what_was_begun_is_continued_with_the_same_settings():
    def check(before, now):
        check_unchanged(before, now, where=Path("runs/a"), instead="--run_name")

    check({"steps": 5, "rate": 0.1}, {"steps": 5, "rate": 0.1})
    check({"steps": 5, "gone": 1}, {"steps": 5})
    check({"steps": 5}, {"steps": 5, "new": 3})  # the record is older than the setting
    with pytest.raises(UserError) as error:
        check({"steps": 5}, {"new": 3, "steps": 6})
    for part in ("runs/a", "steps=5", "not 6", "--run_name"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="new=None, not 3"):
        check({"new": None}, {"new": 3})


def test_what_may_change_is_not_compared():
    fixed = fixed_values(Options(at_once=3))
    assert "at_once" not in fixed
    assert fixed["steps"] == 50
    assert set(fixed) == set(Options.__dataclass_fields__) - {"at_once"}


@pytest.mark.parametrize("options", [BufferOptions, DistillOptions])
def test_options_of_speed_may_change(options):
    fixed = fixed_values(options())
    speed = {"compile", "precision", "unroll", "micro_batch", "eval_at_once", "experts_at_once"}
    assert not speed & set(fixed)
    assert ("trajectories" in fixed) == (options is DistillOptions)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--stepz", "3"], ["--stepz"]),
        (["--step", "3"], ["--step"]),  # no abbreviations
        (["--steps", "many"], ["--steps", "many", "whole number"]),
        (["--steps", "2.5"], ["2.5", "whole number"]),
        (["--steps", "0"], ["--steps", "at least 1", "0"]),
        (["--rate", "0"], ["--rate", "above 0"]),
        (["--rate", "2"], ["--rate", "at most 1"]),
        (["--rate", "nan"], ["nan", "finite"]),
        (["--zca=maybe"], ["maybe", "true or false"]),
        (["--kind", "z"], ["--kind", "'z'", "x, y"]),
        (["--names", "p", "r"], ["--names", "'r'", "p, q"]),
        (["--at_once", "0"], ["--at_once", "at least 1", "0"]),
        (["--at_once", "x"], ["--at_once", "'x'", "whole number or auto"]),
        (["--at_once", "2.5"], ["--at_once", "'2.5'", "whole number or auto"]),
        (["--compile", "yes"], ["--compile", "'yes'", "auto, on, off"]),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(argv, parts):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("stepz: 3", ["stepz", "steps"]),
        ("steps: many", ["steps", "many", "whole number"]),
        ("steps: true", ["steps", "whole number"]),
        ("steps: [1, 2]", ["steps", "single value"]),
        ("steps:", ["steps", "no value"]),
        ("rate: 7", ["rate", "at most 1"]),
        ("kind: z", ["kind", "'z'", "x, y"]),
        ("kind: on", ["kind", "'True'", "x, y"]),
        ("at_once: 0", ["at_once", "at least 1"]),
        ("at_once: on", ["at_once", "whole number or auto"]),
        ("compile: 3", ["compile", "'3'", "auto, on, off"]),
        ("- a list", ["list"]),
        ("steps: [", ["not valid YAML"]),
        ("\x00", ["not valid YAML"]),
    ],
)
def test_a_bad_yaml_is_one_line_that_names_file_and_key(yaml, parts, tmp_path):
    with pytest.raises(UserError) as error:
        parse(yaml=yaml, tmp_path=tmp_path)
    assert "\n" not in str(error.value)
    for part in ["row.yaml", *parts]:
        assert part in str(error.value)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        resolve(Options, [], description="", find_yaml=lambda given: tmp_path / "none.yaml")


# The authors' table: dataset, ipc -> model, syn_steps, expert_epochs, max_start_epoch, lr_img,
# lr_lr, lr_teacher, zca, Iteration, ema_decay
ROWS = {
    ("CIFAR10", 1): ("ConvNetD3", 80, 4, 2, 1e2, 1e-7, 1e-2, True, 6_000, 0.9999),
    ("CIFAR10", 10): ("ConvNetD3", 30, 2, 20, 1e4, 1e-4, 1e-2, True, 60_000, 0.9999),
    ("CIFAR10", 50): ("ConvNetD3", 50, 2, 40, 1e2, 1e-5, 1e-3, False, 1_000_000, 0.999),
    ("CIFAR100", 1): ("ConvNetD3", 50, 4, 20, 500, 1e-5, 1e-2, True, 3_000, 0.9995),
    ("CIFAR100", 10): ("ConvNetD3", 20, 2, 40, 1e3, 1e-5, 1e-2, False, 200_000, 0.9995),
    ("CIFAR100", 50): ("ConvNetD3", 80, 2, 40, 1e3, 1e-5, 1e-2, True, 100_000, 0.999),
    ("Tiny", 1): ("ConvNetD4", 30, 2, 10, 1e4, 1e-4, 1e-2, False, 10_000, 0.999),
    ("Tiny", 10): ("ConvNetD4", 20, 2, 40, 1e4, 1e-5, 1e-4, False, 80_000, 0.999),
    ("ImageNet", 1): ("ConvNetD5", 20, 2, 10, 1e4, 5e-8, 1e-2, False, 10_000, 0.9999),
    ("ImageNet", 10): ("ConvNetD5", 20, 2, 10, 1e4, 1e-4, 1e-2, False, 100_000, 0.999),
}


@pytest.mark.parametrize(("dataset", "ipc"), ROWS)
def test_the_rows_are_the_authors(dataset, ipc):
    path = packaged_yaml(dataset, f"ipc{ipc}")
    options = resolve(DistillOptions, [], description="", find_yaml=lambda given: path).options
    assert (options.dataset, options.ipc) == (dataset, ipc)
    assert ROWS[dataset, ipc] == (
        options.model,
        options.syn_steps,
        options.expert_epochs,
        options.max_start_epoch,
        options.lr_img,
        options.lr_lr,
        options.lr_teacher,
        options.zca,
        options.Iteration,
        options.ema_decay,
    )
    assert options.batch_syn == (1200 if (dataset, ipc) == ("CIFAR100", 50) else None)
    assert options.res == (128 if dataset == "ImageNet" else None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=str)
def test_every_shipped_yaml_is_valid(path):
    kind = BufferOptions if path.stem == "buffer" else DistillOptions
    resolved = resolve(kind, [], description="", find_yaml=lambda given: path)
    assert str(path) in resolved.sources.values()


def test_the_nearest_row():
    assert nearest_row("CIFAR10", 10).name == "ipc10.yaml"
    assert nearest_row("CIFAR10", 5).name == "ipc1.yaml"
    assert nearest_row("CIFAR10", 45).name == "ipc50.yaml"
    assert nearest_row("folder", 1) is None


@pytest.mark.parametrize("options", [BufferOptions, DistillOptions, EvalOptions])
def test_help_explains_every_flag(options, capsys):
    with pytest.raises(SystemExit) as stop:
        resolve(options, ["--help"], description="")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in options.__dataclass_fields__:
        assert f"--{name} " in text
    assert "(default: auto)" in text
