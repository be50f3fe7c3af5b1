"""Check that memory and disk suffice before any work; if not, name flags that make the call fit."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

    @property
    def more(self) -> int:
        """Bytes of the host's memory that nobody holds yet."""
        return self.host - self.held


@dataclass(frozen=True)
class Demand:
    """What a planned call needs, as a function of its flags: `of()` is its need, and
    `of(micro_batch=5)` that of the same call with another value.

    `gentler` has the values that may lower it, from the gentlest on, flags that one would rather
    not change first.
    """

    of: Callable[..., Need]
    gentler: Mapping[str, Sequence[object]]

    @property
    def last_values(self) -> dict[str, Any]:
        """Of all these flags the values that help most."""
        return {flag: values[-1] for flag, values in self.gentler.items() if values}


def check_room(demand: Demand, machine: Machine, *, force: bool) -> None:
    """Print what the call needs and what is free, and check that it suffices.

    UserError where memory or disk are short, saying how the call would fit; with `force` that is
    only a warning. All processes call it and agree on the main one's findings.
    """
    print(f"needs about {_described(demand.of(), machine)}")
    found = ranks.from_main("; ".join(_problems(demand, machine)))
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
        _, free = machine.disk(disks[0].folder)
        parts.append(
            f"{readable(_sum(disks))} of disk in {_folders(disks)} ({readable(free)} free)"
        )
    return ", ".join(parts)


def _problems(demand: Demand, machine: Machine) -> Iterator[str]:
    """What is short, and how to make it fit. A disk with caches alone never is."""
    need = demand.of()
    if need.device > machine.free:
        yield (
            f"too little memory on the GPU: about {readable(need.device)} are needed, "
            f"{readable(machine.free)} are free: "
            + _advice(demand, lambda need: need.device, machine.free, "a GPU with more memory")
        )
    if need.more > machine.host:
        yield (
            f"too little memory: about {readable(need.more)} more are needed, "
            f"{readable(machine.host)} are free: "
            + _advice(demand, lambda need: need.more, machine.host, "a machine with more memory")
        )
    for number, disks in _by_disk(need, machine).items():
        _, free = machine.disk(disks[0].folder)
        places = [disk.elsewhere for disk in disks if disk.elsewhere]
        if places and _sum(disks) > free:
            ways = _ways(demand, partial(_bytes_on, number, machine), free)
            advice = " or ".join([*places, *([ways] if ways else [])])
            yield (
                f"too little disk: about {readable(_sum(disks))} are needed in {_folders(disks)}, "
                f"{readable(free)} are free: pass {advice}"
            )


def _advice(demand: Demand, amount: Callable[[Need], int], free: int, otherwise: str) -> str:
    """How the call fits into `free` bytes, or how far it can be brought down."""
    if ways := _ways(demand, amount, free):
        return f"pass {ways}"
    least = amount(demand.of(**demand.last_values))
    ways = _ways(demand, amount, least)
    return f"even {ways} takes {readable(least)}; use {otherwise}" if ways else f"use {otherwise}"


def _ways(demand: Demand, amount: Callable[[Need], int], limit: int) -> str | None:
    """The gentlest changes of flags that bring `amount` down to `limit`; None where none do, or
    none is needed.

    Beginning with all flags at their last values, each is brought back as far as it still fits.
    """

    def fits(changes: Mapping[str, Any]) -> bool:
        return amount(demand.of(**changes)) <= limit

    chosen = demand.last_values
    if not fits(chosen):
        return None
    for flag, values in demand.gentler.items():
        others = {name: value for name, value in chosen.items() if name != flag}
        candidates = [others, *(others | {flag: value} for value in values)]
        chosen = next(filter(fits, candidates))
    return " and ".join(f"--{flag} {str(value).lower()}" for flag, value in chosen.items()) or None


def _by_disk(need: Need, machine: Machine) -> dict[int, list[Disk]]:
    """Those with something to write, by the number of their file system."""
    found: dict[int, list[Disk]] = {}
    for disk in need.disk:
        if disk.bytes > 0:
            number, _ = machine.disk(disk.folder)
            found.setdefault(number, []).append(disk)
    return found


def _bytes_on(number: int, machine: Machine, need: Need) -> int:
    """What is written on one file system."""
    return _sum(_by_disk(need, machine).get(number, []))


def _sum(disks: Sequence[Disk]) -> int:
    return sum(disk.bytes for disk in disks)


def _folders(disks: Sequence[Disk]) -> str:
    return " and ".join(str(disk.folder) for disk in disks)


def readable(count: int) -> str:
    """Bytes for people: 78 GB, 3.4 GB, 12 MB, 1.0 MB for anything less."""
    unit, size = ("GB", 10**9) if count >= 10**9 else ("MB", 10**6)
    value = max(1, count / size)
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
