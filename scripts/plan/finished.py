"""Recognise a cell that is done without starting its scripts.

A record of a cell says which commands have ended well, what they resolved to (with the YAML files
and defaults of then), and size and times of every file that they could read or write. The cell is
done as long as all of that is the same. Where anything differs its scripts are started, and decide
for themselves. Damage that changes neither size nor times, by a failing disk say, goes unseen here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.plan.cells import Cell
from utils.core.files import write_text

Stamps = dict[str, dict[str, tuple[int, ...]]]  # by folder, then by path in it


def is_finished(cell: Cell, record: Path) -> bool:
    """Whether `record` describes the cell as it would be described now."""
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return _has_outputs(cell) and recorded == _plain(_describe(cell, inputs_of(cell)))


def record_finished(cell: Cell, record: Path, *, inputs: Stamps) -> None:
    """Record that all commands of the cell have ended well; `inputs` are those from before."""
    if _has_outputs(cell):
        write_text(json.dumps(_describe(cell, inputs), indent=1) + "\n", record)


def inputs_of(cell: Cell) -> Stamps:
    """The files that the cell's commands can read now: data set and experts."""
    return {str(folder): _stamps(folder) for folder in cell.inputs}


def _describe(cell: Cell, inputs: Stamps) -> Mapping[str, Any]:
    return {
        "commands": cell.commands,
        "options": [asdict(options) for options in cell.options],
        "inputs": inputs,
        "outputs": {str(folder): _stamps(folder) for folder in cell.outputs},
    }


def _has_outputs(cell: Cell) -> bool:
    """Whether something is where the cell is to leave it: nothing twice would look unchanged."""
    return bool(cell.outputs) and all(map(_stamps, cell.outputs))


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Size and times of what lies in a folder and in its folders; hidden files are not looked at:
    locks, caches, files in writing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            stat = path.lstat()
            found[str(name)] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def _plain(description: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(description))
