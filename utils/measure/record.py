"""Record what eval.py has measured: whole evaluations, and single networks of unfinished ones.

    eval.json               a list of evaluations: settings, acc_mean, acc_std, accs, acc_by_class,
                            accs_by_class, confusion, data, environment; and seconds, where one call
                            has trained all networks
    eval_unfinished.json    a list of networks: settings, network (its number), acc, acc_by_class,
                            confusion, data

`confusion` has a row for each class: how many of its test images were given each label, summed over
the networks. Where there are many classes it is missing, and in records of earlier versions; then
it is that of the networks which have one.

A network follows from its settings, the images that it sees and its number. So one that has been
trained counts in every evaluation that it belongs to, whatever the number of networks in that.
Records from before accuracies by class were kept lack these; where they are wanted, the networks
are measured again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.compute.device import default_device
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import write_text
from utils.core.locks import locked
from utils.core.provenance import describe_environment
from utils.data.identity import KEY
from utils.measure.protocol import Accuracies, Confusion, Measured

Entry = dict[str, Any]
BY_CLASS = "accs_by_class"  # of each network
CONFUSION = "confusion"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation by `num_eval` networks.

    `settings` is what they share, `images` gives a checksum of what a range of them is trained on.
    `data`, a DataIdentity as plain values, is recorded and not compared: earlier records lack it,
    and the checksums in `settings` and of `images` say more.
    """

    settings: Mapping[str, Any]
    images: Callable[[range], str]
    num_eval: int
    data: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, num_eval: int) -> Entry:
        """Its entry in eval.json, without the results, if it were by `num_eval` networks."""
        return {**self.settings, "images": self.images(range(num_eval)), "num_eval": num_eval}

    def network(self, k: int) -> Entry:
        """The entry of its network k in eval_unfinished.json, without the result."""
        return {**self.settings, "images": self.images(range(k, k + 1)), "network": k}


class EvalRecord:
    """The two files in `folder`.

    Several calls of eval.py may record there at the same time: a change is made under a lock, to
    what the files hold then. All processes of a call call the methods; the main one reads and
    writes. UserError where eval.json is damaged or cannot be written. A damaged
    eval_unfinished.json is moved aside: it can only save time.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "eval.json"
        self._unfinished = folder / "eval_unfinished.json"
        self._lock = folder / ".eval.lock"
        read_evaluations(self.path)
        if ranks.is_main() and self._unfinished.exists():
            with locked(self._lock):
                self._move_aside_if_damaged()

    def networks(self, evaluation: Evaluation, *, by_class: bool = False) -> dict[int, Measured]:
        """Find the accuracies of the networks of `evaluation` that have been trained, by number;
        where they are wanted `by_class`, only those of which that is known.

        Networks of an evaluation by more or fewer are what training them again would give. On a
        CUDA device that holds up to rounding, which depends on the networks computed together.
        """
        found = self._networks(evaluation) if ranks.is_main() else {}
        wanted = {k: each for k, each in found.items() if each.by_class or not by_class}
        return ranks.from_main(wanted)

    def keep(self, evaluation: Evaluation, measured: Mapping[int, Measured]) -> None:
        """Record networks, by number, of an evaluation that is not whole yet."""
        if ranks.is_main():
            with locked(self._lock):
                data = {KEY: dict(evaluation.data)}
                new = [
                    {**evaluation.network(k), **_result_of(each), **data}
                    for k, each in measured.items()
                ]
                self._write_unfinished([*self._without(evaluation, measured), *new])

    def add(
        self, evaluation: Evaluation, accuracies: Accuracies, *, seconds: float | None = None
    ) -> Entry:
        """Record a whole evaluation, once, in place of its networks; `seconds` is what all of these
        took together, where one call has trained them. Returns what eval.json says of it.
        """
        description = evaluation.whole(evaluation.num_eval)
        result = {
            "acc_mean": accuracies.mean,
            "acc_std": accuracies.std,
            "accs": list(accuracies.accs),
            **_by_class(accuracies),
            KEY: dict(evaluation.data),
            "environment": describe_environment(default_device()),
            **({} if seconds is None else {"seconds": round(seconds, 1)}),
        }
        if not ranks.is_main():
            return description | result
        with locked(self._lock):
            whole = read_evaluations(self.path)
            same = [entry for entry in whole if _matches(description, entry)]
            # One that says more takes the place of one from before.
            if not same or (BY_CLASS in result and all(BY_CLASS not in each for each in same)):
                others = [entry for entry in whole if entry not in same]
                _write([*others, description | result], self.path)
            # Last: whoever is interrupted in between has the networks twice, not lost, and the same
            # call again, which finds the evaluation whole, comes by here.
            self._write_unfinished(self._without(evaluation, range(evaluation.num_eval)))
        return (same or [description | result])[-1]

    def _networks(self, evaluation: Evaluation) -> dict[int, Measured]:
        found: dict[int, Measured] = {}
        unfinished = self._read_unfinished()
        for k in range(evaluation.num_eval):
            description = evaluation.network(k)
            for entry in unfinished:
                if _matches(description, entry):
                    by_class = tuple(entry.get("acc_by_class", ()))
                    found[k] = Measured(entry["acc"], by_class, _confusion_of(entry))
        alike = [
            entry for entry in read_evaluations(self.path) if _matches(evaluation.settings, entry)
        ]
        # The one by just as many networks comes last, for its result stands.
        wanted = evaluation.num_eval
        for entry in sorted(alike, key=lambda entry: _nearness(len(entry["accs"]), wanted)):
            if _matches(evaluation.whole(len(entry["accs"])), entry):
                found |= dict(enumerate(_measured(entry, wanted)))
        return found

    def _without(self, evaluation: Evaluation, numbers: Iterable[int]) -> list[Entry]:
        """What is unfinished, without these networks of `evaluation`."""
        gone = [evaluation.network(k) for k in numbers]
        unfinished = self._read_unfinished()
        return [
            entry for entry in unfinished if not any(_matches(network, entry) for network in gone)
        ]

    def _read_unfinished(self) -> list[Entry]:
        return [entry for entry in _read(self._unfinished) or [] if _is_network(entry)]

    def _write_unfinished(self, entries: list[Entry]) -> None:
        if entries:
            _write(entries, self._unfinished)
        else:
            self._unfinished.unlink(missing_ok=True)

    def _move_aside_if_damaged(self) -> None:
        entries = _read(self._unfinished)
        if entries is None or not all(map(_is_network, entries)):
            aside = self._unfinished.with_name(f"{self._unfinished.name}.damaged")
            os.replace(self._unfinished, aside)
            print(f"{self._unfinished} is damaged and now {aside.name}: going on without it")


def read_evaluations(path: Path) -> list[Entry]:
    """Read the whole evaluations of an eval.json; none where there is no file.

    Each has trained_on, model, accs, acc_mean and acc_std. UserError where the file is damaged.
    """
    entries = _read(path)
    if entries is None or not all(map(_is_whole, entries)):
        raise UserError(
            f"{path} cannot be read as a list of evaluations: mend it, or move it away to measure "
            "again"
        )
    return entries


def _by_class(accuracies: Accuracies) -> Entry:
    """The accuracies by class, in their order: means, and those of each network; the confusion."""
    confusion = {CONFUSION: accuracies.confusion} if accuracies.confusion else {}
    if not accuracies.by_class:
        return confusion
    means = [each and each.mean for each in accuracies.of_classes]
    return {"acc_by_class": means, BY_CLASS: list(map(list, accuracies.by_class)), **confusion}


def _result_of(measured: Measured) -> Entry:
    by_class = {"acc_by_class": list(measured.by_class)} if measured.by_class else {}
    confusion = {CONFUSION: measured.confusion} if measured.confusion else {}
    return {"acc": measured.acc, **by_class, **confusion}


def _nearness(number: int, wanted: int) -> tuple[bool, bool, int]:
    """How much of what is `wanted` networks an evaluation by `number` of them says."""
    return number == wanted, number <= wanted, number


def _measured(entry: Entry, most: int) -> list[Measured]:
    """The first networks of a whole evaluation, at most so many; where these are all, the first has
    the confusion of all of them.
    """
    accs = entry["accs"]
    by_class = entry.get(BY_CLASS) or [()] * len(accs)
    whole = _confusion_of(entry) if len(accs) <= most else ()
    pairs = zip(accs[:most], by_class[:most], strict=True)
    return [Measured(acc, tuple(each), () if k else whole) for k, (acc, each) in enumerate(pairs)]


def _confusion_of(entry: Entry) -> Confusion:
    """The confusion of an entry, empty where it has none."""
    value: Any = entry.get(CONFUSION, ())
    classes = len(entry.get("acc_by_class") or ())
    return value if is_confusion(value) and len(value) == classes else ()


def is_confusion(value: Any) -> bool:
    """Whether it is a square of counts."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, list) and len(row) == len(value) for row in value)
        and all(type(count) is int and count >= 0 for row in value for count in row)
    )


def _matches(description: Mapping[str, Any], entry: Entry) -> bool:
    return description.items() <= entry.items()


def _is_whole(entry: Any) -> bool:
    """Whether an entry has what readers of eval.json rely on."""
    if not isinstance(entry, dict) or not isinstance(entry.get("accs"), list):
        return False
    accs = entry["accs"]
    return (
        bool(accs)
        and len(accs) == entry.get("num_eval")
        and _are_by_class(entry.get(BY_CLASS, [[]] * len(accs)), len(accs))
        and all(_is_fraction(acc) for acc in [*accs, entry.get("acc_mean"), entry.get("acc_std")])
        and all(isinstance(entry.get(name), str) for name in ("trained_on", "model"))
    )


def _is_network(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("network"), int)
        and _is_fraction(entry.get("acc"))
        and _are_by_class([entry.get("acc_by_class", [])], 1)
    )


def _are_by_class(rows: Any, count: int) -> bool:
    """Whether these are the accuracies by class of so many networks."""
    return (
        isinstance(rows, list)
        and len(rows) == count
        and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
        and all(value is None or _is_fraction(value) for row in rows for value in row)
    )


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _read(path: Path) -> list[Any] | None:
    """The list in a file, empty where there is no file; None where there is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, list) else None


def _write(entries: list[Entry], path: Path) -> None:
    write_text(json.dumps(entries, indent=1) + "\n", path)
