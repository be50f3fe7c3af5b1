"""Keep tensors that are slow to make on disk, for the next run."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import torch_save
from utils.core.locks import locked

Tensors = dict[str, Tensor]


def cached(
    path: Path, key: str, build: Callable[[], Tensors], *, level: int = logging.WARNING
) -> Tensors:
    """Read the CPU tensors of `key` from `path`; make them by `build` where it does not hold them.

    A file with another key, or a damaged one (its checksum does not match), is replaced by one
    process while others wait. Where `path` cannot be written, one line is logged at `level`.
    """
    stored = _load(path, key)
    if stored is not None:
        return stored
    with locked(path.with_name(f".{path.name}.lock")):
        stored = _load(path, key)
        if stored is not None:
            return stored
        tensors = build()
        try:
            torch_save({"key": key, "checksum": digest(tensors), "tensors": tensors}, path)
        except UserError as error:
            logging.getLogger(__name__).log(level, "going on without a cache: %s", error)
        return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a checksum of names, types, shapes and values."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).numpy().data)
    return state.hexdigest()


def _load(path: Path, key: str) -> Tensors | None:
    """Read `path`; None if it is missing, damaged or of another key."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        stored = torch.load(path, weights_only=True)
        if stored["key"] == key and stored["checksum"] == digest(stored["tensors"]):
            return stored["tensors"]
    except Exception:  # a damaged file can make the reader raise anything
        pass
    return None
