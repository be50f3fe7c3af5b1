"""Files that are whole or absent: written beside the target, synced, then renamed over it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import UserError


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    Missing parent folders are made; text is UTF-8. On any error the temporary file is removed
    and the file already at `path`, if there is one, stays as it is.

    Raises:
        UserError: the operating system refuses (no room, no permission), with its reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def torch_save(obj: Any, path: str | Path) -> None:
    """`torch.save(obj, path)`, atomically. Raises UserError like `atomic_write`."""
    with atomic_write(path) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # torch reports a full disk as a failed assertion; the OSError is its context.
            raise error.__context__ or error from None


def write_text(text: str, path: str | Path) -> None:
    """Write `text` as UTF-8, atomically. Raises UserError like `atomic_write`."""
    with atomic_write(path, "w") as file:
        file.write(text)


def check_writable(folder: str | Path) -> None:
    """Raise UserError if `folder` cannot be made or written to; for checks before long work."""
    existing = Path(folder).resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {existing} is no folder that may be written to")
