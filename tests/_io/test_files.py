import errno
import os
import stat

import pytest

from parchgrad._io import files
from parchgrad._io.files import check_outputs, writing, writing_together
from parchgrad.errors import OutputError
from tests.support import needs_links


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
        pytest.raises(OutputError, match="Cannot write"),
        writing(tmp_path / "a" / "b.txt"),
    ):
        pass


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a.txt"
    check_outputs([path], force=False)
    path.touch()
    check_outputs([path], force=True)
    with pytest.raises(OutputError, match=r"Cannot write .* below"):
        check_outputs([path / "deeper" / "b.txt"], force=True)
    with pytest.raises(OutputError, match="already exists"):
        check_outputs([path], force=False)


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
    with pytest.raises(OutputError, match=r"c' \(No space left on device\)"):
        write()
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}
    write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "later")


def test_what_appears_meanwhile_is_not_overwritten_unasked(tmp_path):
    def write(*, force):
        with writing_together([first, second], force=force) as drafts:
            for draft in drafts:
                draft.write_text("later")
            second.write_text("meanwhile")

    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    with pytest.raises(OutputError, match=r"b.txt' already exists"):
        write(force=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.txt": "meanwhile"}
    with pytest.raises(OutputError, match=r"b.txt' already exists"), writing(second, force=False):
        raise AssertionError("it is said before the block")
    write(force=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "later", "b.txt": "later"}
    second.unlink()
    with writing(second, force=False) as temporary:
        temporary.write_text("new")
    assert second.read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions.")
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


@needs_links
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


@needs_links
def test_two_results_are_told_though_a_link_leads_to_one_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OutputError, match="Two results would be written to"):
        check_outputs([tmp_path / "real" / "a.png", tmp_path / "link" / "a.png"], force=True)


@needs_links
def test_an_input_is_not_overwritten_by_way_of_a_link(tmp_path):
    (tmp_path / "photo.png").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="is an input"):
        check_outputs([tmp_path / "link" / "photo.png"], force=True, inputs=[tmp_path / "photo.png"])
