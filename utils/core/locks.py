"""Lock files, so that one process at a time works on something; they end with their process."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.core.errors import UserError

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, *, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` during the block; make it where it is missing.

    Where another process holds it: wait, or, with a `refusal`, raise UserError with that text.
    Where the file system knows no locks, or nothing may be written, go on without.
    """
    lock = _lock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=refusal is None)
    except Timeout:
        raise UserError(refusal) from None
    except OSError as error:
        # Without permission to write, the first file written there says so.
        if error.errno in WITHOUT_LOCKS:
            logging.getLogger(__name__).warning(
                "%s is on a file system without locks: start nothing else that works there", path
            )
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether another process (or another part of this one) holds the lock file `path`."""
    try:
        with _lock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _lock(path: Path) -> FileLock:
    """A lock for all users of the folder; never a marker file, which outlives its process."""
    return FileLock(path, mode=0o666, fallback_to_soft=False)
