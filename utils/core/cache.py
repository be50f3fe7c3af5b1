"""Tensors that are slow to make, kept on disk for the next run."""

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


def cached(path: Path, key: str, build: Callable[[], Tensors]) -> Tensors:
    """The CPU tensors that `build` makes for `key`, read from `path` where that holds them.

    A file with another key, or one that is damaged (its checksum does not match), is replaced, by
    one process while others wait for it. Where `path` cannot be written the tensors are returned
    all the same, with one warning.
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
            logging.getLogger(__name__).warning("going on without a cache: %s", error)
        return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).numpy().data)
    return state.hexdigest()


def _load(path: Path, key: str) -> Tensors | None:
    """What `path` holds under `key`, or None if it is missing, damaged or of another key."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        stored = torch.load(path, weights_only=True)
        if stored["key"] == key and stored["checksum"] == digest(stored["tensors"]):
            return stored["tensors"]
    except Exception:  # a damaged file can make the reader raise anything
        pass
    return None
