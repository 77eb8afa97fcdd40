import pytest

from parchgrad.errors import OutputError
from parchgrad.files import check_outputs, writing


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
