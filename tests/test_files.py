"""Files are whole or absent."""

import os
from pathlib import Path

import pytest
import torch

from utils.core.errors import UserError
from utils.core.files import (
    NEW_FOLDERS,
    atomic_write,
    check_writable,
    torch_load,
    torch_save,
    write_text,
)


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


def test_folders_inside_one_another_are_not_made_without_end(tmp_path):
    check_writable(tmp_path.joinpath(*["d"] * NEW_FOLDERS))
    with pytest.raises(UserError, match="1500 folders inside one another"):
        check_writable(tmp_path.joinpath(*["d"] * 1500))
    assert not any(tmp_path.iterdir())


def test_a_record_marked_as_a_folder_is_not_read_as_whatever_is_in_memory(tmp_path):
    path = tmp_path / "a.pt"
    torch_save(torch.zeros(3), path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 38] |= 0x10  # external attributes
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt is damaged \(record 'data/0'"):
        torch_load(path)


def test_an_archive_without_a_list_of_records_is_damaged(tmp_path):
    path = tmp_path / "a.pt"
    torch_save(torch.zeros(3), path)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x06\x06")
    content[end + 40 : end + 48] = bytes(8)  # the length of the list
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt is damaged \(its list of records is empty\)"):
        torch_load(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_the_format_before_torch_1_6_is_read(tmp_path, mmap):
    torch.save([torch.arange(3)], tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch_load(tmp_path / "a.pt", mmap=mmap)[0].tolist() == [0, 1, 2]


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("link")
    for name, reason in [
        ("pipe", "is no file"),
        ("folder", "is no file"),
        ("link", "is not there"),
        ("absent", "is not there"),
        ("folder/absent", "is not there"),
    ]:
        with pytest.raises(UserError, match=f"{name} {reason}"):
            torch_load(tmp_path / name)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_a_whole_file_that_does_not_fit_into_memory_is_not_called_damaged(
    tmp_path, monkeypatch, error
):
    def fail(*arguments, **keywords):
        raise error

    torch_save(torch.zeros(3), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"a\.pt does not fit into memory"):
        torch_load(tmp_path / "a.pt")
