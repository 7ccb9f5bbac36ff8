"""What has its name is whole, whatever interrupts the writing."""

import pytest

from lockstep.engine.files import whole_file, whole_folder, write_whole


def test_a_file_replaces_the_earlier_one_once_it_is_whole(tmp_path):
    target = tmp_path / "file"
    write_whole(target, "first ½")
    with whole_file(target) as file:
        file.write_text("second")
        assert target.read_text(encoding="utf-8") == "first ½"
    assert target.read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    target = tmp_path / "new" / "folder"
    (tmp_path / "new" / ".tmp-folder" / "of_a_killed_process").mkdir(parents=True)
    with whole_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("text")
        assert not target.exists()
    assert [path.name for path in target.rglob("*")] == ["deep", "file"]
    assert list((tmp_path / "new").iterdir()) == [target]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_interrupted_one_leaves_nothing(tmp_path, whole):
    def write_half():
        with whole(tmp_path / "target") as path:
            (path / "file" if whole is whole_folder else path).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("kept")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("other")
    assert (tmp_path / "target" / "file").read_text() == "kept"
