"""Run directories as the report sees them: how a run was made, how far it came, what was measured.

A run without a setting that came later had that setting's default; one that lacks what every
version has had, or has what this one does not know, is of another version.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from networks import canonical_name
from utils.config import fixed_values, resolve
from utils.errors import UserError
from utils.evaluation import Accuracies
from utils.expert_buffer import NATIVE_RES
from utils.options import DistillOptions
from utils.run_dir import read_records

Record = Mapping[str, Any]

FILES = ("config.yaml", "metrics.jsonl")
SMOKE = "smoke"  # run_all.sh --smoke leaves its runs in a folder of this name: they show nothing
NEEDED = ("dataset", "model", "ipc", "syn_steps", "expert_epochs", "length", "Iteration", "seed")
# How experts are trained, as far as the settings of the run that uses them do not say it.
EXPERT_SETTINGS = tuple("batch_train lr_teacher mom l2 decay dsa dsa_strategy rho alpha".split())
DISTILLED = {"raw": "distilled raw", "ema": "distilled ema"}


@dataclass(frozen=True)
class Measured:
    """Networks of one architecture, trained on one set; `chosen_by` says how the iteration of a
    distilled one was chosen: test, val, last, or the iteration that was asked for.
    """

    trained_on: str
    model: str
    accuracies: Accuracies
    epochs: int
    seed: int
    chosen_by: str


@dataclass(frozen=True)
class Run:
    """A run that has ended, at its last iteration or where it `diverged`.

    `measured` holds the evaluation of each (trained on, network) that counts: of the chosen
    iteration before the last before others; then the longest training, the most networks, the
    latest. `calls` are the environments of distill_att.py and eval.py.
    """

    path: Path
    options: DistillOptions
    experts: Record | None
    calls: Sequence[Record]
    measured: Mapping[tuple[str, str], Measured]
    rewinds: int
    diverged: int | None

    @property
    def model(self) -> str:
        return canonical_name(self.options.model)

    @property
    def method(self) -> str:
        return method_name(asdict(self.options))

    def settings(self) -> dict[str, Any]:
        """All that alters the result but seeds, in one spelling."""
        known, names = self.experts or {}, ("number", "epochs", *EXPERT_SETTINGS)
        experts = {f"experts' {name}": known[name] for name in names if name in known}
        return row_settings(self.options) | experts


def row_settings(options: DistillOptions) -> dict[str, Any]:
    """The options that alter a result, but the seed, in one spelling."""
    return {
        **{name: value for name, value in fixed_values(options).items() if name != "seed"},
        "Iteration": options.Iteration,
        "model": canonical_name(options.model),
        "res": options.res or NATIVE_RES.get(options.dataset),
    }


def method_name(config: Record) -> str:
    """The method that a configuration amounts to: ATT, MTT, or what is added to it, as ATT + PP.

    DATM trains on FTD's experts, so flat ones are part of it.
    """
    length = config["length"]
    from_two = config.get("start_epochs") is not None
    parts = {
        "ATT": length == "att",
        length: length not in ("att", "fixed"),  # a policy of one's own
        "FTD": config.get("flat", False) and not from_two,
        "DATM": from_two,
        "PP": config.get("prune_threshold") is not None,
        "TESLA": config.get("gradient", "exact") == "tesla",
    }
    return " + ".join(name for name, is_in in parts.items() if is_in) or "MTT"


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in and below `paths`, and a line for each path or directory that cannot be used."""
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    twins: dict[str, Path] = {}
    for path in paths:
        folders = find_run_dirs(path)
        if not folders:
            problems.append(f"{path}: there is no run directory")
        for folder in folders:
            if folder.resolve() in runs:
                continue
            try:
                run = read_run(folder)
            except UserError as error:
                problems.append(" ".join(str(error).split()))
                continue
            same = json.dumps([run.settings(), run.options.seed], default=str)
            if same in twins:
                problems.append(f"{folder}: has the settings and seed of {twins[same]}")
            else:
                twins[same] = folder
                runs[folder.resolve()] = run
    return list(runs.values()), problems


def find_run_dirs(path: Path) -> list[Path]:
    """The run directories in and below `path`, but for those of smoke runs below it."""
    found = {file.parent for name in FILES for file in path.rglob(name)}
    return sorted(folder for folder in found if SMOKE not in folder.relative_to(path).parts)


def read_run(path: Path) -> Run:
    """UserError names a directory that is unfinished, damaged or of another version."""
    options, experts, calls = read_config(path / "config.yaml")
    records = read_records(path / "metrics.jsonl")
    diverged = _divergence(records)
    steps = {r["iteration"] for r in records if r["kind"] == "step"}
    done = len(steps & set(range(options.Iteration)))
    if done < options.Iteration and diverged is None:
        raise UserError(f"{path}: is unfinished, {done} of {options.Iteration} steps")
    entries = read_evaluations(path / "eval.json")
    return Run(
        path=path,
        options=options,
        experts=experts,
        calls=[*calls, *(e["environment"] for e in entries if _is_mapping(e.get("environment")))],
        measured={**_logged(records, options), **_evaluated(entries, options)},
        rewinds=sum(r["kind"] == "rewind" for r in records),
        diverged=diverged,
    )


def read_config(path: Path) -> tuple[DistillOptions, Record | None, list[Record]]:
    """The options in a run's config.yaml, what it says of the experts, and the calls so far."""
    options = resolve(DistillOptions, [], description="", find_yaml=lambda given: path).options
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if missing := [name for name in NEEDED if name not in content]:
        raise UserError(f"{path}: is of another version, it lacks {', '.join(missing)}")
    experts, calls = content.get("experts"), content.get("environment") or []
    return (
        options,
        experts if _is_mapping(experts) else None,
        [call for call in (calls if isinstance(calls, list) else [calls]) if _is_mapping(call)],
    )


def _divergence(records: Sequence[Record]) -> int | None:
    """The iteration at which the run diverged, if that is how it ended."""
    ends = [r for r in records if r["kind"] in ("step", "diverged")]
    return ends[-1]["iteration"] if ends and ends[-1]["kind"] == "diverged" else None


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The entries of an eval.json, none where there is no file. UserError for a damaged one."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(map(_is_evaluation, entries)):
        raise UserError(f"{path}: cannot be read as a list of evaluations")
    return entries


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_evaluation(entry: Any) -> bool:
    return (
        _is_mapping(entry)
        and all(isinstance(entry.get(name), str) for name in ("trained_on", "model"))
        and isinstance(entry.get("epochs"), int)
        and _are_accuracies(entry.get("accs"))
    )


def _are_accuracies(accs: Any) -> bool:
    return isinstance(accs, list) and bool(accs) and all(isinstance(a, int | float) for a in accs)


def _evaluated(
    entries: Sequence[Record], options: DistillOptions
) -> dict[tuple[str, str], Measured]:
    """Of what eval.py has measured, the entries that count."""
    ranked = []
    for number, entry in enumerate(entries):
        tag = _tag(entry) if entry["trained_on"] in DISTILLED.values() else ""
        measured = Measured(
            trained_on=entry["trained_on"],
            model=canonical_name(entry["model"]),
            accuracies=Accuracies(tuple(entry["accs"])),
            epochs=entry["epochs"],
            seed=entry.get("seed", 0),
            chosen_by={"best": options.select, "last": "last", "": ""}.get(tag, f"iteration {tag}"),
        )
        rank = (tag == "best", tag == "last", measured.epochs, len(entry["accs"]), number)
        ranked.append((rank, measured))
    ordered = sorted(ranked, key=lambda each: each[0])
    return {(measured.trained_on, measured.model): measured for _, measured in ordered}


def _tag(entry: Record) -> str:
    """best, last or an iteration, from the file's name distilled_[ema_]<tag>.pt."""
    name = Path(str(entry.get("distilled", "?"))).stem
    return name.removeprefix("distilled_").removeprefix("ema_")


def _logged(records: Sequence[Record], options: DistillOptions) -> dict[tuple[str, str], Measured]:
    """Of the evaluations of distill_att.py those of the chosen iterations, in each set."""
    evals = [
        r
        for r in records
        if r["kind"] == "eval"
        and isinstance(r.get("model"), str)
        and _are_accuracies(r.get("accs"))
    ]
    if options.Iteration > 0 and not any(r["iteration"] > 0 for r in evals):
        return {}  # of the images before any step
    own = canonical_name(options.evaluation_models[0])
    found = {}
    for set, trained_on in DISTILLED.items():
        of_set = [r for r in evals if r.get("set") == set]
        chosen = _chosen([r for r in of_set if canonical_name(r["model"]) == own], options.select)
        for record in of_set:
            if record["iteration"] == chosen:
                model = canonical_name(record["model"])
                found[trained_on, model] = Measured(
                    trained_on=trained_on,
                    model=model,
                    accuracies=Accuracies(tuple(record["accs"])),
                    epochs=options.epoch_eval_train,
                    seed=options.seed,
                    chosen_by=options.select,
                )
    return found


def _chosen(evals: Sequence[Record], select: str) -> int | None:
    """The iteration whose set distill_att.py keeps as the best, the first of several."""
    if select == "last":
        return max((r["iteration"] for r in evals), default=None)
    name = "val_accs" if select == "val" else "accs"
    measured = [r for r in evals if _are_accuracies(r.get(name))]
    best = max(measured, key=lambda r: Accuracies(tuple(r[name])).mean, default=None)
    return best["iteration"] if best else None
