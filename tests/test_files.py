import errno
import os
import stat
import time
from contextlib import suppress

import pytest

from parchgrad import files
from parchgrad.errors import OutputError
from parchgrad.files import check_outputs, remove_abandoned, writing, writing_together


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with writing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("earlier")

    def write_half():
        with writing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("file")
    with (
        pytest.raises(OutputError, match=r"cannot be written .*choose another folder"),
        writing(tmp_path / "a" / "b.txt"),
    ):
        pass


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a.txt"
    check_outputs([path], force=False)
    path.touch()
    check_outputs([path], force=True)
    with pytest.raises(OutputError, match="cannot be written below"):
        check_outputs([path / "deeper" / "b.txt"], force=True)
    with pytest.raises(OutputError, match="exists already; choose another place"):
        check_outputs([path], force=False)


def left_behind(path):
    """The folder that a process which is killed while it writes leaves."""
    with suppress(KeyboardInterrupt), writing(path) as temporary:
        raise KeyboardInterrupt
    temporary.parent.mkdir()
    temporary.touch()
    return temporary.parent


def test_files_of_the_user_are_left_alone(tmp_path):
    path, long_ago = tmp_path / "photo.png", (time.time() - 7200,) * 2
    ours, other, linked = (left_behind(path) for _ in range(3))
    (other / "mine.txt").touch()
    (linked / "new.png").unlink()
    linked.rmdir()
    linked.symlink_to(other)
    # safetensors writes by way of such a file.
    (ours / ".tmpAbCdEf").touch()
    (tmp_path / ".photo.20240101.png").touch()
    (tmp_path / ".photo.deadbeef.png").mkdir()
    (tmp_path / f"{other.name[:-1]}g").mkdir()
    kept = {*tmp_path.rglob("*")} - {ours, *ours.rglob("*")}
    for file in sorted(tmp_path.rglob("*"), reverse=True):
        os.utime(file, long_ago, follow_symlinks=False)
    with writing(path):
        pass
    assert {*tmp_path.rglob("*")} == {path, *kept}


def test_what_may_not_be_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    left = left_behind(tmp_path / "a.txt")

    def forbidden(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.shutil, "rmtree", forbidden)
    remove_abandoned(tmp_path / "a.txt")
    assert left.exists()


@pytest.mark.parametrize("name", ["x" * 248 + ".png", "x." + "y" * 250])
def test_names_as_long_as_they_may_be(tmp_path, name):
    check_outputs([tmp_path / name], force=False)
    with writing(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("earlier")
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(descriptor)

    def write():
        with writing_together(paths) as drafts:
            for draft in drafts:
                draft.write_text("later")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"c' cannot be written \(No space left on device\); make room"):
        write()
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}
    write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "later")


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_is_not_overwritten_unasked(tmp_path, monkeypatch, links):
    def unsupported(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def write(*, force):
        with writing_together([first, second], force=force) as drafts:
            for draft in drafts:
                draft.write_text("later")
            second.write_text("meanwhile")

    if not links:
        monkeypatch.setattr(files.os, "link", unsupported)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    with pytest.raises(OutputError, match=r"b.txt' exists already"):
        write(force=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.txt": "meanwhile"}
    with pytest.raises(OutputError, match=r"b.txt' exists already"), writing(second, force=False):
        raise AssertionError("it is said before the block")
    write(force=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "later", "b.txt": "later"}
    second.unlink()
    with writing(second, force=False) as temporary:
        temporary.write_text("new")
    assert second.read_text() == "new"
    assert second.stat().st_nlink == 1


def test_permissions_are_kept(tmp_path):
    path, private = tmp_path / "a.txt", tmp_path / "private.txt"
    private.touch(mode=0o600)
    private.chmod(0o400)
    for file in (path, private):
        with writing(file) as temporary:
            assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
            temporary.chmod(0o606)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert stat.S_IMODE(private.stat().st_mode) == 0o400


def test_what_a_link_leads_to_is_written(tmp_path):
    place = tmp_path / "elsewhere" / "true.txt"
    place.parent.mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(place)
    for text in ("first", "second"):
        with writing(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert place.read_text() == text
    assert [path.name for path in place.parent.iterdir()] == ["true.txt"]


def test_errors_name_the_file_and_not_its_draft(tmp_path):
    path = tmp_path / "it's.txt"

    with pytest.raises(OutputError) as error, writing(path) as draft:
        draft.unlink()
    assert repr(str(path)) in str(error.value)
    assert ".parchgrad-" not in str(error.value)


def test_two_results_are_told_though_a_link_leads_to_one_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OutputError, match="Two results would be written to"):
        check_outputs([tmp_path / "real" / "a.png", tmp_path / "link" / "a.png"], force=True)


def test_an_input_is_known_by_any_of_its_names(tmp_path):
    # Where a file system tells no capitals, two names are of one file, as these are.
    (tmp_path / "A.png").touch()
    os.link(tmp_path / "A.png", tmp_path / "a.png")
    with pytest.raises(OutputError, match="is what the results are made from"):
        check_outputs([tmp_path / "a.png"], force=True, inputs=[tmp_path / "A.png"])
