"""Whether there is as much memory and disk as a call needs, and how to make it fit where not."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.core import ranks
from utils.core.errors import UserError
from utils.plan.memory import disk_of, free_bytes, free_disk_bytes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Disk:
    """Bytes still to be written in `folder`, with copies while files are replaced. `elsewhere` says
    how to write them elsewhere; it is empty for a cache, which is left out where there is no room.
    """

    folder: Path
    bytes: int
    elsewhere: str = ""


@dataclass(frozen=True)
class Need:
    """At the most, in bytes: on a CUDA device (0 on a CPU) by this process; in the host's memory by
    all processes of this machine, `held` of which they hold by now; on disk.
    """

    device: int
    host: int
    held: int
    disk: tuple[Disk, ...]


@dataclass(frozen=True)
class Demand:
    """What a call needs: `of({})` as it is, `of({flag: value})` with other values of some flags.

    `flags` names those that may lower it, with their values from the gentlest on; those that one
    would rather not change come first.
    """

    of: Callable[[Mapping[str, Any]], Need]
    flags: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class _Room:
    """Bytes that are free: on the device, in the host's memory, and of each disk, by its number."""

    device: int
    host: int
    disks: Mapping[int, int]

    @classmethod
    def now(cls, need: Need, device: torch.device) -> "_Room":
        return cls(
            device=free_bytes(device),
            host=free_bytes(CPU),
            disks={disk_of(disk.folder): free_disk_bytes(disk.folder) for disk in need.disk},
        )


def check_room(demand: Demand, device: torch.device, *, force: bool) -> None:
    """Print what the call needs and what is free, and see that it suffices; all processes call it.

    UserError where memory or disk are short, saying how the call would fit; with `force` that is
    only a warning. Each process looks at the memory, the main one at the disks too; they agree.
    """
    need = demand.of({})
    room = _Room.now(need, device)
    print(f"needs about {_described(need, room)}")
    problems = [*_memory_problems(demand, room, device)]
    if ranks.is_main():
        problems += _disk_problems(demand, room)
    found = next(filter(None, ranks.gather("; ".join(problems))), None)
    if found is None:
        return
    if not force:
        raise UserError(f"{found}, or pass --force")
    if ranks.is_main():
        logging.getLogger(__name__).warning("going on by --force: %s", found)


def _described(need: Need, room: _Room) -> str:
    """In one line."""
    parts = []
    if need.device:
        parts.append(f"{readable(need.device)} on the GPU ({readable(room.device)} free)")
    parts.append(
        f"{readable(need.host)} of memory ({readable(need.held)} held by now, "
        f"{readable(room.host)} free)"
    )
    for number, disks in _by_disk(need.disk).items():
        free = readable(room.disks[number])
        parts.append(f"{readable(_sum(disks))} of disk in {_folders(disks)} ({free} free)")
    return ", ".join(parts)


def _memory_problems(demand: Demand, room: _Room, device: torch.device) -> Iterator[str]:
    """What is short of memory, and how to make it fit."""
    need = demand.of({})
    if need.device > room.device and device.type == "cuda":
        advice = _advice(demand, lambda other: other.device, room.device, "a GPU with more memory")
        yield (
            f"too little memory on the GPU: about {readable(need.device)} are needed, "
            f"{readable(room.device)} are free: {advice}"
        )
    if need.host - need.held > room.host:
        advice = _advice(
            demand, lambda other: other.host - need.held, room.host, "a machine with more memory"
        )
        yield (
            f"too little memory: about {readable(need.host - need.held)} more are needed, "
            f"{readable(room.host)} are free: {advice}"
        )


def _disk_problems(demand: Demand, room: _Room) -> Iterator[str]:
    """What is short of disk, and how to make it fit. A disk with caches alone never is."""
    for number, disks in _by_disk(demand.of({}).disk).items():
        free = room.disks[number]
        places = [disk.elsewhere for disk in disks if disk.elsewhere]
        if _sum(disks) <= free or not places:
            continue

        def amount(need: Need, number: int = number) -> int:
            return _sum(_by_disk(need.disk).get(number, []))

        ways = _ways(demand, amount, free)
        advice = " or ".join([*places, *([ways] if ways else [])])
        yield (
            f"too little disk: about {readable(_sum(disks))} are needed in {_folders(disks)}, "
            f"{readable(free)} are free: pass {advice}"
        )


def _advice(demand: Demand, amount: Callable[[Need], int], free: int, otherwise: str) -> str:
    """How the call fits into `free` bytes, or how far it can be brought down."""
    if ways := _ways(demand, amount, free):
        return f"pass {ways}"
    least = amount(demand.of(_last_values(demand)))
    ways = _ways(demand, amount, least)
    if ways is None:
        return f"use {otherwise}"
    return f"even {ways} takes {readable(least)}; use {otherwise}"


def _ways(demand: Demand, amount: Callable[[Need], int], limit: int) -> str | None:
    """The gentlest changes of flags that bring `amount` down to `limit`; None where none do, or
    none is needed.

    Beginning with all flags at their last values, each is brought back as far as it still fits.
    """
    chosen = _last_values(demand)
    if amount(demand.of(chosen)) > limit:
        return None
    for flag, values in demand.flags.items():
        for value in [None, *values]:
            changed = {name: kept for name, kept in chosen.items() if name != flag}
            changed |= {flag: value} if value is not None else {}
            if amount(demand.of(changed)) <= limit:
                chosen = changed
                break
    return " and ".join(f"{flag} {value}" for flag, value in chosen.items()) or None


def _last_values(demand: Demand) -> dict[str, Any]:
    return {flag: values[-1] for flag, values in demand.flags.items() if values}


def _by_disk(disks: Sequence[Disk]) -> dict[int, list[Disk]]:
    """Those with something to write, by the number of their disk."""
    found: dict[int, list[Disk]] = {}
    for disk in disks:
        if disk.bytes > 0:
            found.setdefault(disk_of(disk.folder), []).append(disk)
    return found


def _sum(disks: Iterable[Disk]) -> int:
    return sum(disk.bytes for disk in disks)


def _folders(disks: Iterable[Disk]) -> str:
    return " and ".join(str(disk.folder) for disk in disks)


def readable(count: int) -> str:
    """Bytes for people: 78 GB, 3.4 GB, 12 MB, 1.0 MB for anything less."""
    unit, size = ("GB", 10**9) if count >= 10**9 else ("MB", 10**6)
    value = max(1, count / size)
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
