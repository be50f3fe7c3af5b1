"""Recognise a cell that is done without starting its scripts.

A record of a cell says which commands have ended well, what they resolved to (with the YAML files
and defaults of then), and size and times of every file that they could read or write. The cell is
done as long as all of that is the same. Where anything differs its scripts are started, and decide
for themselves. Damage that changes neither size nor times, by a failing disk say, goes unseen here.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from scripts.plan.cells import Cell
from utils.core.files import write_text

Stamps = dict[str, dict[str, tuple[int, ...]]]  # by folder, then by path in it


def is_finished(cell: Cell, record: Path) -> bool:
    """Whether `record` describes the cell as it would be described now."""
    try:
        recorded = record.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return recorded == _description(cell, inputs_of(cell))


def record_finished(cell: Cell, record: Path, *, inputs: Stamps) -> None:
    """Record that all commands of the cell have ended well; `inputs` are those from before."""
    if description := _description(cell, inputs):
        write_text(description, record)


def inputs_of(cell: Cell) -> Stamps:
    """The files that the cell's commands can read now: data set and experts."""
    return _stamps(cell.inputs)


def _description(cell: Cell, inputs: Stamps) -> str | None:
    """None where a folder of the outputs is empty: nothing twice would look unchanged."""
    outputs = _stamps(cell.outputs)
    if not outputs or not all(outputs.values()):
        return None
    description = {
        "commands": cell.commands,
        "options": [asdict(options) for options in cell.options],
        "inputs": inputs,
        "outputs": outputs,
    }
    return json.dumps(description, indent=1) + "\n"


def _stamps(folders: Iterable[Path]) -> Stamps:
    """Size and times of what lies in folders and in their folders; hidden files are not looked at:
    locks, caches, files in writing.
    """
    found: Stamps = {}
    for folder in folders:
        files = found[str(folder)] = {}
        for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
            name = path.relative_to(folder)
            if not any(part.startswith(".") for part in name.parts):
                stat = path.lstat()
                files[str(name)] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found
