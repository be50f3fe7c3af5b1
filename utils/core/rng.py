"""Randomness: one user seed, split into independent named streams."""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and the path `names`, such as ("expert", 3, "init")."""
    path = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream `names`.

    Drawing on the CPU gives the same numbers whatever the device the work runs on.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *names))
