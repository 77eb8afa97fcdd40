"""Disks that are full, folders that may not be written, and names that cannot be files."""

import errno
import os
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from parchgrad._io import files
from parchgrad._io.files import check_outputs, locked, writing
from parchgrad.errors import OutputError
from tests.support import close, contents, run
from tests.system.writers import WRITERS, make_writers


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return make_writers(tmp_path_factory.mktemp("reported"))


@pytest.fixture
def save(request, writers):
    return writers[request.param]


@contextmanager
def largest_file(size):
    """No file may grow beyond a number of bytes; Python ignores the signal, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save", WRITERS, indirect=True)
@pytest.mark.parametrize("size", [0, 50])
def test_a_full_disk_leaves_earlier_files_as_they_were(tmp_path, save, size):
    write, names = save
    for name in names:
        (tmp_path / name).write_text("earlier")
    earlier = contents(tmp_path)
    with largest_file(size), pytest.raises(OutputError, match=r"Cannot write .* \(.*File too large.*\)"):
        write(tmp_path)
    assert contents(tmp_path) == earlier
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert b"earlier" not in contents(tmp_path).values()


def test_a_report_that_finds_room_for_some_files_changes_none(tmp_path, writers):
    write, names = writers["report"]
    for name in names:
        (tmp_path / name).write_text("earlier")
    with largest_file(20_000), pytest.raises(OutputError, match=r"report.html' .*\(File too large\)"):
        write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(names, b"earlier")


def test_an_explanation_whose_last_file_finds_no_room_changes_none(tmp_path, writers, monkeypatch):
    write, names = writers["explanation"]
    for name in names:
        (tmp_path / name).write_text("earlier")
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"a.json' \(No space left on device\)"):
        write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(names, b"earlier")


@contextmanager
def mounted(folder, options):
    """A file system of its own, which a few lines below would not do without."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not everywhere")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_array_without_room_is_told_by_the_systems_error(tmp_path):
    with mounted(tmp_path, "size=40k"):
        full = pytest.raises(OutputError, match=r"a.npy' \(No space left on device\)")
        with full, files.writing(tmp_path / "a.npy") as temporary:
            files.save_array(np.zeros(20_000), temporary)
        assert contents(tmp_path) == {}


@pytest.mark.parametrize("save", WRITERS, indirect=True)
def test_no_room_is_said(tmp_path, save):
    write, names = save
    with mounted(tmp_path, "size=4k"):
        (tmp_path / names[0]).write_bytes(b"earlier" * 500)
        earlier = contents(tmp_path)
        with pytest.raises(OutputError, match=rf"{names[0]}.*No space left on device"):
            write(tmp_path)
        assert contents(tmp_path) == earlier


@pytest.mark.parametrize("save", WRITERS, indirect=True)
def test_a_folder_that_may_not_be_written_is_said(tmp_path, save):
    write, names = save
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="Cannot write"):
            write(tmp_path)
        tmp_path.chmod(0o700)
        return
    with mounted(tmp_path, "ro"):
        with pytest.raises(OutputError, match="Cannot write"):
            write(tmp_path)
        with pytest.raises(OutputError, match=r"Cannot write .* below"):
            check_outputs([tmp_path / "new" / names[0]], force=False)


def test_rows_that_found_no_room_are_had_again(tmp_path):
    whole = run(tmp_path / "whole")
    rows = tmp_path / "full" / "rows-0.jsonl"
    with (
        largest_file((tmp_path / "whole" / "rows-0.jsonl").stat().st_size // 2),
        pytest.raises(OutputError, match=r"rows-0.jsonl' \(File too large\)"),
    ):
        run(tmp_path / "full")
    kept = rows.read_bytes()
    assert kept.count(b"\n") > 2
    assert not kept.endswith(b"\n")
    close(run(tmp_path / "full"), whole)
    assert rows.read_bytes().startswith(kept[: kept.rindex(b"\n")])
    assert sorted(path.name for path in rows.parent.iterdir()) == [
        ".rows-0.jsonl.lock",
        "examples.safetensors",
        "rows-0.jsonl",
        "run.json",
    ]


def test_a_lock_stays_where_it_is(tmp_path):
    with locked(tmp_path / "a"):
        # Who had opened it before it was removed would hold a lock of no name, and another one of the next.
        held = (tmp_path / ".a.lock").stat().st_ino
    with locked(tmp_path / "a"):
        assert (tmp_path / ".a.lock").stat().st_ino == held
        with pytest.raises(OutputError, match=r"lock file '.*\.a\.lock'"), locked(tmp_path / "a"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


@pytest.mark.parametrize("force", [False, True])
def test_names_that_cannot_be_files(tmp_path, force):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wrong = [(tmp_path, "is a folder")]
    wrong += [] if force else [(tmp_path / "link", "already exists"), (tmp_path / "loop", "already exists")]
    for path, words in wrong:
        with pytest.raises(OutputError, match=words):
            check_outputs([path], force=force)
    check_outputs([tmp_path / "new" / "a.txt"], force=force)
    with pytest.raises(OutputError, match="File name too long"), writing(tmp_path / ("x" * 300)):
        pass
    with pytest.raises(OutputError, match="not a regular file"), writing(Path("/dev/null")):
        pass


@pytest.mark.parametrize("place", [(files.Path, "touch"), (files.os, "fsync"), (files.Path, "replace")])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EROFS, "Check its permissions"),
        (errno.EIO, "Check its permissions"),
    ],
)
def test_any_error_of_the_system_is_an_output_error(tmp_path, monkeypatch, place, number, remedy):
    (tmp_path / "a.txt").write_text("earlier")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*place, fail)
    words = rf"Cannot write .* \({os.strerror(number)}\)\. {remedy}"
    with pytest.raises(OutputError, match=words), writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("later")
    assert contents(tmp_path) == {"a.txt": b"earlier"}
