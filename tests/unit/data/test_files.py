"""Files appear complete or not at all, and failures name the path."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError, ResourceError
from data.files import atomic_path, digest_json, file_digest, make_folder, read_json, remove_temporaries, write_atomic


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_is_atomic_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two\xff")
    assert path.read_bytes() == b"two\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_error_in_the_body_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EACCES, DataError), (errno.EROFS, DataError)],
)
def test_full_or_read_only_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[Exception]
) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(kind, match=r"file\.txt"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_device_without_space(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_path(tmp_path / "unused") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"x" * 100000)

    with pytest.raises(ResourceError, match="room"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(DataError, match="file"):
        write_atomic(tmp_path / "file" / "child.txt", "x")


def test_leftovers_are_removed(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "keep", "x")
    (tmp_path / "a" / ".keep.0123.tmp").write_text("half")
    remove_temporaries(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["keep"]


def test_digests(tmp_path: Path) -> None:
    assert digest_json({"a": 1, "b": [2, None]}) == digest_json({"b": [2, None], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": "1"})
    with pytest.raises(ValueError, match="JSON"):
        digest_json(float("nan"))
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="missing"):
        file_digest(tmp_path / "missing")


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
