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
    ("word", "name", "value"),
    [
        ("--zca", "zca", True),
        ("--zca=True", "zca", True),
        ("--zca=False", "zca", False),
        ("--zca=0", "zca", False),
        ("--no_zca", "zca", False),
        ("--no_aug", "no_aug", True),
        ("--no_aug=True", "no_aug", True),
        ("--no_aug=False", "no_aug", False),
        ("--steps=1e3", "steps", 1000),
        ("--number_of_steps=9", "steps", 9),
        ("--rate=1e-07", "rate", 1e-7),
        ("--at_once=auto", "at_once", None),
        ("--at_once=1e1", "at_once", 10),
    ],
)
def test_the_spellings_of_a_flag(word, name, value, tmp_path):
    yaml = f"zca: {value is False}\nat_once: 7"
    assert getattr(parse(word, yaml=yaml, tmp_path=tmp_path).options, name) == value


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("rate: 1e-7", 1e-7),  # for YAML 1.1 a text
        ("steps: 1e4", 10_000),
        ("size: null", None),
        ("zca: on", True),
        ("no_aug: off", False),
        ("at_once: auto", None),
        ("at_once: 4", 4),
        ("names: p", ["p"]),
        ("names: [p, q]", ["p", "q"]),
        *[(f"compile: {word}", word) for word in ("on", "off", "auto")],  # for YAML 1.1 booleans
        *[("compile: 'on'", "on"), ("compile: true", "on"), ("compile: false", "off")],
    ],
)
def test_the_spellings_of_yaml(yaml, value, tmp_path):
    resolved, name = parse(yaml=yaml, tmp_path=tmp_path), yaml.partition(":")[0]
    assert getattr(resolved.options, name) == value
    assert resolved.sources[name] == str(tmp_path / "row.yaml")


def test_lists_and_what_is_not_given():
    assert parse("--names", "p", "q").options.names == ["p", "q"]
    assert (parse().options.size, parse().options.at_once) == (None, None)


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
        (["--size", "auto"], ["'auto' is not a whole number (see"]),
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
        (None, ["cannot read"]),
        ("- a list", ["list"]),
        ("steps: [", ["not valid YAML"]),
        ("\x00", ["not valid YAML"]),
    ],
)
def test_a_bad_yaml_is_one_line_that_names_file_and_key(yaml, parts, tmp_path):
    path = tmp_path / "row.yaml"
    if yaml is not None:
        path.write_text(yaml)
    with pytest.raises(UserError) as error:
        resolve(Options, [], description="", find_yaml=lambda given: path)
    assert "\n" not in str(error.value)
    for part in ["row.yaml", *parts]:
        assert part in str(error.value)


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
