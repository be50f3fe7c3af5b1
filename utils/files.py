"""Files that are whole or absent: written beside the target, synced, then renamed over it."""

import os
import zipfile
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


def torch_load(path: Path, *, mmap: bool = False) -> Any:
    """What `torch_save` wrote, on the CPU: tensors and plain containers only, never code.

    With `mmap` the tensors are read from disk when they are used; torch's format from before 1.6,
    which is no zip archive, is read at once. Raises UserError for a file that cannot be read.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except PermissionError:
        raise UserError(f"{path} may not be read: check its permissions") from None
    except Exception:  # a damaged file can fail anywhere in torch's reader
        raise UserError(f"{path} is damaged, or more than tensors and plain values") from None


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
