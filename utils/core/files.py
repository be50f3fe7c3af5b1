"""Write files so that they are whole or absent, and read them checked.

A file is written beside its target, synced, then renamed over it. Writers hold a lock
(`utils/core/locks.py`), so the temporary file can have a fixed name, and a leftover is overwritten.
"""

import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch

from utils.core.errors import UserError

CHUNK = 2**20  # bytes read at a time
REPLACES_MAPPED = os.name != "nt"  # whether a file that is mapped can be replaced
NEW_FOLDERS = 100  # that are made inside one another; a thousand exhaust Python's recursion
MARKED_AS_FOLDER = 0x10  # in a zip archive; torch's reader gives uninitialised memory for such
# torch warns of some files before it refuses them; the error says it in one line.
warnings.filterwarnings("ignore", message="Detected pickle protocol")


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    Missing parent folders are made; text is UTF-8. On any error the temporary file is removed
    and the file already at `path`, if there is one, stays as it is.

    Raises:
        UserError: the operating system refuses (no room, no permission), with its reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes `path` when the block ends without an error.

    On any error it is removed, and nothing is at `path`, or an empty folder if there was one.

    Raises:
        UserError: the operating system refuses, or `path` is a folder that is not empty.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as content:
                    os.fsync(content.fileno())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure, where its file system can; on Windows a
    folder cannot be opened.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def torch_save(obj: Any, path: str | Path) -> None:
    """`torch.save(obj, path)`, atomically. Raises UserError like `atomic_write`."""
    with atomic_write(path) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # torch reports a full disk as a failed assertion; the OSError is its context.
            raise error.__context__ or error from None


def torch_load(path: Path, *, mmap: bool = False, also: Sequence[Any] = ()) -> Any:
    """Read what `torch_save` wrote, on the CPU: tensors and plain containers only, never code.

    With `mmap` the tensors are read from disk when they are used. Either way the whole file is read
    once, in bounded pieces, to compare its checksums, which torch.load itself does not do. Torch's
    format from before 1.6 is no zip archive: it has no checksums, so damage to the values of a
    tensor is not noticed, and it cannot be mapped. `also` are further types of plain values, as
    `torch.serialization.safe_globals` takes them.

    Raises:
        UserError: the file is not there, may not be read, is damaged, or holds something else.
    """
    is_archive = False
    try:
        if not path.is_file():
            raise UserError(f"{path} is {'no file' if path.exists() else 'not there'}")
        is_archive = _is_archive(path)
        if is_archive:
            _check_archive(path)
        with torch.serialization.safe_globals([*also]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path} may not be read: check its permissions") from None
    except Exception as error:  # a damaged file can fail anywhere in the readers
        if is_archive and (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise torch.OutOfMemoryError(f"{path} does not fit into memory") from None
        raise UserError(f"{path} is damaged, or more than tensors and plain values") from None


def _is_archive(path: Path) -> bool:
    """Whether torch would read `path` as a zip archive."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """UserError where a record of the archive does not match its checksum."""
    with zipfile.ZipFile(path) as archive:
        if not archive.infolist():
            raise UserError(f"{path} is damaged (its list of records is empty)")
        for record in archive.infolist():
            if not _is_whole(archive, record):
                name = record.filename.partition("/")[2]  # the folder's name is the file's
                raise UserError(f"{path} is damaged (record {name!r} does not match its checksum)")


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    if record.external_attr & MARKED_AS_FOLDER:
        return False
    try:
        with archive.open(record) as content:
            while content.read(CHUNK):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def is_dense(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor with values in memory, not a sparse, nested or empty shell of one."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
    )


def write_text(text: str, path: str | Path) -> None:
    """Write `text` as UTF-8, atomically. Raises UserError like `atomic_write`."""
    with atomic_write(path, "w") as file:
        file.write(text)


def check_new_folder(folder: Path) -> None:
    """Raise UserError if `folder` cannot be made, or is there and not empty."""
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there and not empty: name a folder that is to be made")


def check_writable(folder: str | Path) -> None:
    """Raise UserError if `folder` cannot be made or written to; call it before long work."""
    folder, missing = Path(folder), 0
    existing = folder
    try:
        while not (existing.is_symlink() or existing.exists()):
            existing, missing = existing.parent, missing + 1
        is_folder = existing.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or has a null in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder}: {reason}") from None
    if not is_folder or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {existing} is no folder that may be written to")
    if missing > NEW_FOLDERS:
        raise UserError(
            f"cannot write to {folder}: {missing} folders inside one another are to be made, at "
            f"most {NEW_FOLDERS} can be"
        )
