"""One process at a time."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from utils.core.errors import UserError
from utils.core.locks import is_held, locked

ROOT = Path(__file__).parent.parent
HOLD = "import sys, time; from pathlib import Path; from utils.core.locks import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_lock_refuses_another_process_until_it_is_killed(tmp_path):
    path = tmp_path / "new" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_held(path)
        with pytest.raises(UserError, match="somebody"), locked(path, refusal="somebody is here"):
            pass
        holder.kill()
        holder.wait()
    assert not is_held(path)
    with locked(path, refusal="somebody is here"):
        assert is_held(path)
    assert not is_held(path)


def test_an_error_within_lets_go(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / ".lock"):
        raise KeyError
    assert not is_held(tmp_path / ".lock")


def test_where_nothing_can_be_written_work_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / ".lock", refusal="no"):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def acquire(*args, **kwargs):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("utils.core.locks.FileLock.acquire", acquire)
    with locked(tmp_path / ".lock", refusal="no"):
        pass
    assert "without locks" in caplog.text
