"""Write, check and read expert trajectories in the field's layout (MTT, FTD, ATT, DATM).

`<buffer_path>/<dataset>/<model>/replay_buffer_<n>.pt` is a list of experts, an expert a list of
snapshots (before the first epoch, then after each), a snapshot the list of parameter tensors in
`network.parameters()` order, float32 on the CPU. Until the last expert of such a file is trained,
those before it are kept in `finished_expert_<number>.pt`, each a list of one expert.
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.config.resolve import check_unchanged
from utils.core import files as core_files
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import is_dense, torch_load, torch_save, write_text
from utils.core.locks import is_held, locked
from utils.data.identity import KEY, DataIdentity
from utils.data.source import SplitName

Snapshot = list[Tensor]
Expert = list[Snapshot]

SETTINGS = "experts.json"
SEEN: tuple[SplitName, ...] = ("train",)  # what experts are trained on
LOCKS = ".replay_buffer_*.lock"


def snapshot(network: nn.Module) -> Snapshot:
    """Copy the parameters, float32 on the CPU; `cpu()` alone would alias what is there."""
    return [param.detach().cpu().float().clone() for param in network.parameters()]


def buffer_files(folder: Path) -> list[Path]:
    """List the files replay_buffer_<n>.pt of `folder`, by n."""
    names = re.compile(r"replay_buffer_(0|[1-9][0-9]*)\.pt")
    files = (path for path in folder.glob("replay_buffer_*.pt") if names.fullmatch(path.name))
    try:
        return sorted(files, key=file_number)
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}") from None


def file_number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def read_file(path: Path, *, mmap: bool = True) -> list[Expert]:
    """Read the experts of one file, with `mmap` from disk when they are used.

    Raises UserError for a file that is damaged or holds something else. Shapes and values are
    checked where they are used, by ExpertBuffer.
    """
    try:
        experts = torch_load(path, mmap=mmap)
    except UserError as error:
        raise UserError(f"buffer file {error}") from None
    if not _is_list_of_experts(experts):
        raise UserError(f"buffer file {path} does not hold a list of expert trajectories")
    return experts


def _is_list_of_experts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(isinstance(expert, list) and len(expert) > 1 for expert in content)
        and all(isinstance(snap, list) for expert in content for snap in expert)
        and all(map(_is_param, chain.from_iterable(chain.from_iterable(content))))
    )


def _is_param(value: Any) -> bool:
    return is_dense(value) and value.is_floating_point()


@contextmanager
def lock_and_list_missing(
    folder: Path,
    settings: dict[str, Any],
    numbers: range,
    *,
    experts_per_file: int,
    images: DataIdentity | None = None,
) -> Iterator[list[int]]:
    """Lock the files of the experts `numbers` during the block; yield the numbers still to train.

    Of the processes of one call the main one does so, and tells the others. Another call may add
    other files meanwhile. UserError where one is at work on these, and where the experts in
    `folder` are trained otherwise than with `settings`, or on other `images`.
    """
    if not ranks.is_main():
        yield ranks.from_main([])
        return
    with ExitStack() as held:
        with locked(folder / ".lock"):  # one process at a time takes and begins
            taken = {_lock_of(_file_of(folder, number, experts_per_file)) for number in numbers}
            for lock in sorted(taken):
                refusal = (
                    f"another process trains the experts of {lock.stem[1:]} in {folder}: wait "
                    "until it ends, or choose others by --first_expert and --num_experts"
                )
                held.enter_context(locked(lock, refusal=refusal))
            missing = missing_experts(folder, numbers, experts_per_file=experts_per_file)
            is_alone = not any(is_held(lock) for lock in set(folder.glob(LOCKS)) - taken)
            begin(folder, settings, images=images, adding=bool(missing), alone=is_alone)
        fill_files(folder, numbers, experts_per_file=experts_per_file)  # what a kill cut off
        yield ranks.from_main(missing)


def _lock_of(file: Path) -> Path:
    return file.with_name(f".{file.stem}.lock")


def begin(
    folder: Path,
    settings: dict[str, Any],
    *,
    images: DataIdentity | None = None,
    adding: bool = True,
    alone: bool = True,
) -> None:
    """Record how the experts of `folder` are trained; refuse to mix them with others.

    Settings without a single finished expert are replaced where this process is `alone`, images
    without a begun one. Experts from elsewhere have no settings beside them: good as they are, but
    not for `adding`.
    """
    path, recorded = folder / SETTINGS, read_settings(folder)
    unfinished, finished = (kept_experts(folder, name) for name in ("unfinished", "finished"))
    is_new = alone and not (buffer_files(folder) or finished)
    if images is not None and KEY in (recorded or {}) and (unfinished or not is_new):
        check_images(folder, images)
    if is_new and (not unfinished or _without_images(recorded) != settings):
        _forget(folder, unfinished)
        of_images = {} if images is None else {KEY: images.to_dict()}
        write_text(json.dumps(settings | of_images, indent=1) + "\n", path)
    elif recorded is None:
        raise UserError(f"{path} holds no settings as JSON; move {folder} away or mend it")
    elif recorded:
        check_unchanged(recorded, settings, where=folder, instead="--buffer_path")
    elif adding:
        raise UserError(
            f"the experts in {folder} are not from this buffer.py (no {SETTINGS} beside them): "
            "they can be used, but not added to; pass another --buffer_path"
        )


def _without_images(recorded: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (recorded or {}).items() if name != KEY}


def check_images(folder: Path, images: DataIdentity) -> None:
    """UserError where the experts of `folder` were trained on others than `images`; print a line
    where nothing tells.
    """
    images.check_same_as(
        (read_settings(folder) or {}).get(KEY),
        SEEN,
        what=f"experts in {folder}",
        advice="give the --data_path that they are from, or another --buffer_path",
    )


def holds_experts(folder: Path) -> bool:
    """Whether experts have been begun in `folder`."""
    return bool(buffer_files(folder) or _own_files(folder))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Read how the experts of `folder` were trained: {} without a record, None where it cannot be
    read.
    """
    try:
        recorded = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, dict) else None


def missing_experts(folder: Path, numbers: range, *, experts_per_file: int) -> list[int]:
    """List which of the experts `numbers` are neither in their buffer file nor in one of their own.

    UserError names a damaged file.
    """
    there: set[int] = set()
    try:
        for first in _first_numbers(numbers, experts_per_file):
            there |= {*range(first, first + _count(_file_of(folder, first, experts_per_file)))}
        for number in kept_experts(folder, "finished") & {*numbers}:
            there |= {number} if _count(finished_file(folder, number)) else set()
    except UserError as error:
        raise UserError(f"{error}; delete it, and its experts are trained again") from None
    return [number for number in numbers if number not in there]


def _first_numbers(numbers: Collection[int], experts_per_file: int) -> list[int]:
    """The first expert of each file that holds one of `numbers`."""
    return sorted({number - number % experts_per_file for number in numbers})


def _count(path: Path) -> int:
    """How many experts a file holds, 0 where there is none.

    A file is read and checked once a call as long as it stays the same: a hundred experts take
    seconds.
    """
    if not path.exists():
        return 0
    stat = path.stat()
    return _count_experts(path, (stat.st_mtime_ns, stat.st_ino, stat.st_size))


@cache
def _count_experts(path: Path, version: tuple[int, ...]) -> int:
    return len(read_file(path))


def keep_expert(folder: Path, number: int, expert: Expert) -> None:
    """Write a trained expert to a file of its own, where it stays until `fill_files`."""
    torch_save([expert], finished_file(folder, number))
    unfinished_file(folder, number).unlink(missing_ok=True)


def fill_files(folder: Path, numbers: range, *, experts_per_file: int) -> None:
    """Write each buffer file whose last expert, of those among `numbers`, has been kept.

    Experts that the file holds already come first. Files of their own are removed for what it
    holds. UserError names a file that is damaged or cannot be written.
    """
    finished = kept_experts(folder, "finished")
    kept = {number for number, _ in _own_files(folder)} & {*numbers}
    for first in _first_numbers(kept, experts_per_file):
        path = _file_of(folder, first, experts_per_file)
        behind = first + _count(path)  # the first that is not in the file
        own = [*takewhile(finished.__contains__, range(behind, first + experts_per_file))]
        if own and own[-1] + 1 >= min(first + experts_per_file, numbers.stop):
            files = [path] if path.exists() else []
            files += [finished_file(folder, number) for number in own]
            read = partial(read_file, mmap=core_files.REPLACES_MAPPED)
            torch_save([expert for file in files for expert in read(file)], path)
            behind += len(own)
        _forget(folder, range(first, behind))


def _file_of(folder: Path, number: int, experts_per_file: int) -> Path:
    return folder / f"replay_buffer_{number // experts_per_file}.pt"


def unfinished_file(folder: Path, number: int) -> Path:
    """Where an expert is kept while it is trained (`utils/experts/unfinished.py`)."""
    return folder / f"unfinished_expert_{number}.pt"


def finished_file(folder: Path, number: int) -> Path:
    """Where an expert is kept until its buffer file is written."""
    return folder / f"finished_expert_{number}.pt"


def kept_experts(folder: Path, which: str) -> set[int]:
    """Numbers of the experts that have files of their own; `which`: finished or unfinished."""
    return {
        number for number, file in _own_files(folder) if file.name == f"{which}_expert_{number}.pt"
    }


def _forget(folder: Path, numbers: Collection[int]) -> None:
    """Remove the files of their own of the experts `numbers`."""
    for number, file in _own_files(folder):
        if number in numbers:
            file.unlink(missing_ok=True)


def _own_files(folder: Path) -> list[tuple[int, Path]]:
    """Files that hold one expert, half-written ones included, with its number."""
    name = re.compile(r"\.?(?:un)?finished_expert_(\d+)\.pt(?:\.next|\.tmp)*")
    matches = ((name.fullmatch(file.name), file) for file in folder.glob("*finished_expert_*"))
    return [(int(match[1]), file) for match, file in matches if match]
