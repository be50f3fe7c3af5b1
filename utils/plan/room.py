"""Check that memory and disk suffice before any work; if not, name flags that make the call fit."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils.core import ranks
from utils.core.errors import UserError
from utils.plan.machine import Machine


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
    """Upper bounds in bytes: on a GPU (0 on a CPU) by this process; in the host's memory by all
    processes of this machine, `held` of which they hold already; on disk.
    """

    device: int
    host: int
    held: int
    disk: tuple[Disk, ...]


@dataclass(frozen=True)
class Call:
    """What a call is to do, as far as its need depends on it: fields are named as their flags."""

    nproc_per_node: int
    compile: str  # "on" or "off"


C = TypeVar("C", bound=Call)


@dataclass(frozen=True)
class Demand(Generic[C]):
    """A planned call, what such a call needs, and the values of flags that may lower it.

    `gentler` has these from the gentlest on, flags that one would rather not change first.
    """

    call: C
    of: Callable[[C], Need]
    gentler: Mapping[str, Sequence[object]]

    @property
    def need(self) -> Need:
        return self.of(self.call)


def check_room(demand: Demand[C], machine: Machine, *, force: bool) -> None:
    """Print what the call needs and what is free, and check that it suffices.

    UserError where memory or disk are short, saying how the call would fit; with `force` that is
    only a warning. All processes call it and agree on the main one's findings.
    """
    print(f"needs about {_described(demand.need, machine)}")
    problems = [*_memory_problems(demand, machine), *_disk_problems(demand, machine)]
    found = ranks.from_main("; ".join(problems))
    if not found:
        return
    if not force:
        raise UserError(f"{found}, or pass --force")
    if ranks.is_main():
        logging.getLogger(__name__).warning("going on by --force: %s", found)


def _described(need: Need, machine: Machine) -> str:
    """In one line."""
    parts = []
    if need.device:
        parts.append(f"{readable(need.device)} on the GPU ({readable(machine.free)} free)")
    parts.append(
        f"{readable(need.host)} of memory ({readable(need.held)} held by now, "
        f"{readable(machine.host)} free)"
    )
    for disks in _by_disk(need, machine).values():
        free = readable(_free(disks, machine))
        parts.append(f"{readable(_sum(disks))} of disk in {_folders(disks)} ({free} free)")
    return ", ".join(parts)


def _memory_problems(demand: Demand[C], machine: Machine) -> Iterator[str]:
    """What is short of memory, and how to make it fit."""

    def more(need: Need) -> int:
        return need.host - need.held

    need = demand.need
    if need.device > machine.free:
        yield (
            f"too little memory on the GPU: about {readable(need.device)} are needed, "
            f"{readable(machine.free)} are free: "
            + _advice(demand, lambda need: need.device, machine.free, "a GPU with more memory")
        )
    if more(need) > machine.host:
        yield (
            f"too little memory: about {readable(more(need))} more are needed, "
            f"{readable(machine.host)} are free: "
            + _advice(demand, more, machine.host, "a machine with more memory")
        )


def _disk_problems(demand: Demand[C], machine: Machine) -> Iterator[str]:
    """What is short of disk, and how to make it fit. A disk with caches alone never is."""
    for number, disks in _by_disk(demand.need, machine).items():
        free = _free(disks, machine)
        places = [disk.elsewhere for disk in disks if disk.elsewhere]
        if _sum(disks) <= free or not places:
            continue

        def amount(need: Need, number: int = number) -> int:
            return _sum(_by_disk(need, machine).get(number, []))

        ways = _ways(demand, amount, free)
        advice = " or ".join([*places, *([ways] if ways else [])])
        yield (
            f"too little disk: about {readable(_sum(disks))} are needed in {_folders(disks)}, "
            f"{readable(free)} are free: pass {advice}"
        )


def _advice(demand: Demand[C], amount: Callable[[Need], int], free: int, otherwise: str) -> str:
    """How the call fits into `free` bytes, or how far it can be brought down."""
    if ways := _ways(demand, amount, free):
        return f"pass {ways}"
    least = amount(demand.of(replace(demand.call, **_last_values(demand))))
    ways = _ways(demand, amount, least)
    return f"even {ways} takes {readable(least)}; use {otherwise}" if ways else f"use {otherwise}"


def _ways(demand: Demand[C], amount: Callable[[Need], int], limit: int) -> str | None:
    """The gentlest changes of flags that bring `amount` down to `limit`; None where none do, or
    none is needed.

    Beginning with all flags at their last values, each is brought back as far as it still fits.
    """

    def fits(changes: Mapping[str, Any]) -> bool:
        return amount(demand.of(replace(demand.call, **changes))) <= limit

    chosen = _last_values(demand)
    if not fits(chosen):
        return None
    for flag, values in demand.gentler.items():
        others = {name: value for name, value in chosen.items() if name != flag}
        candidates = [others, *(others | {flag: value} for value in values)]
        chosen = next(filter(fits, candidates))
    return " and ".join(f"--{flag} {str(value).lower()}" for flag, value in chosen.items()) or None


def _last_values(demand: Demand[C]) -> dict[str, Any]:
    return {flag: values[-1] for flag, values in demand.gentler.items() if values}


def _by_disk(need: Need, machine: Machine) -> dict[int, list[Disk]]:
    """Those with something to write, by the number of their file system."""
    found: dict[int, list[Disk]] = {}
    for disk in need.disk:
        if disk.bytes > 0:
            number, _ = machine.disk(disk.folder)
            found.setdefault(number, []).append(disk)
    return found


def _free(disks: Sequence[Disk], machine: Machine) -> int:
    """Free bytes of the file system that all of them lie on."""
    return machine.disk(disks[0].folder)[1]


def _sum(disks: Iterable[Disk]) -> int:
    return sum(disk.bytes for disk in disks)


def _folders(disks: Iterable[Disk]) -> str:
    return " and ".join(str(disk.folder) for disk in disks)


def readable(count: int) -> str:
    """Bytes for people: 78 GB, 3.4 GB, 12 MB, 1.0 MB for anything less."""
    unit, size = ("GB", 10**9) if count >= 10**9 else ("MB", 10**6)
    value = max(1, count / size)
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
