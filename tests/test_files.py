"""Files are whole or absent."""

from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.files import atomic_write, torch_save, write_text


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_only_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"one")
    with atomic_write(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_text_and_tensors_come_back(tmp_path):
    write_text("grüße\n", tmp_path / "a.txt")
    torch_save({"x": torch.arange(3)}, tmp_path / "a.pt")
    assert (tmp_path / "a.txt").read_text("utf-8") == "grüße\n"
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "save",
    [lambda path: torch_save(torch.zeros(10**6), path), lambda path: write_text("x" * 10**6, path)],
    ids=["torch_save", "write_text"],
)
def test_no_room_is_one_line_and_the_old_file_stays(tmp_path, save):
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes")
    path = tmp_path / "a"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*a: File too large") as raised:
            save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*taken/a\.pt: "):
        torch_save(1, tmp_path / "taken" / "a.pt")
