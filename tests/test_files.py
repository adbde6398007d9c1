"""Atomic replacement of files and folders: readers see the old content or the new, never a part, whatever fails."""

from pathlib import Path

import pytest

from ddpm_pipeline.files import remove, replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_folder(folder, text):
    folder.mkdir()
    (folder / "weights").write_text(text)
    return folder


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "report.json"
    for text in ("first", "second"):  # there is nothing to replace, then there is
        before = path.read_text() if path.exists() else None
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == tmp_path and temporary.name.startswith(".")
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert names(tmp_path) == ["report.json"]


def test_a_path_may_be_a_string(tmp_path):
    with replacing(str(tmp_path / "a")) as temporary:
        temporary.write_text("text")
    assert (tmp_path / "a").read_text() == "text"


def test_a_folder_is_replaced_with_all_its_content(tmp_path):
    path = write_folder(tmp_path / "pipeline", "old")
    (path / "only in the old one").touch()
    with replacing(path) as temporary:
        write_folder(temporary, "new")
        assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["pipeline"] and names(path) == ["weights"]
    assert (path / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_old_content_is_unchanged(tmp_path, kind, error):
    path = tmp_path / "a"
    if kind == "file":
        path.write_text("old")
    else:
        write_folder(path, "old")

    def interrupted():
        with replacing(path) as temporary:
            if kind == "file":
                temporary.write_text("half")
            else:
                write_folder(temporary, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == ["a"]
    assert (path if kind == "file" else path / "weights").read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["pipeline", ".pipeline.old"])
def test_the_old_folder_survives_if_the_new_one_cannot_be_renamed(tmp_path, monkeypatch, name):
    """Under its own name, also if an earlier process was killed between the two renames."""
    write_folder(tmp_path / name, "old")
    path, rename = tmp_path / "pipeline", Path.rename

    def failing_rename(self, target):
        if ".tmp-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="no"), replacing(path) as temporary:
        write_folder(temporary, "new")
    assert names(tmp_path) == ["pipeline"] and (path / "weights").read_text() == "old"


@pytest.mark.parametrize("leftovers", [[".pipeline.old"], [".pipeline.old", "pipeline"]])
def test_leftovers_of_a_killed_process_are_removed_when_the_new_folder_is_in_place(tmp_path, leftovers):
    """Killed between the two renames, only the .old folder is left: it must stay until there is a new one."""
    for name in leftovers:
        write_folder(tmp_path / name, "old")
    with replacing(tmp_path / "pipeline") as temporary:
        assert not temporary.exists()
        assert (tmp_path / leftovers[-1] / "weights").read_text() == "old"
        write_folder(temporary, "new")
    assert names(tmp_path) == ["pipeline"]
    assert (tmp_path / "pipeline" / "weights").read_text() == "new"


def test_other_files_are_left_alone(tmp_path):
    others = ["report.json.old", ".report.json.old", ".report.json.tmp-0", "report.json.bak"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "report.json") as temporary:
        temporary.write_text("text")
    assert names(tmp_path) == sorted([*others, "report.json"])


def test_writers_of_one_path_do_not_meet(tmp_path):
    """Nested here; threads, or processes with the same id on two machines, in life. The last to end wins."""
    with replacing(tmp_path / "a") as outer:
        outer.write_text("outer")
        with replacing(tmp_path / "a") as inner:
            inner.write_text("inner")
        assert (tmp_path / "a").read_text() == "inner"
    assert (tmp_path / "a").read_text() == "outer" and names(tmp_path) == ["a"]


def test_remove_takes_files_folders_and_links_but_not_what_a_link_points_to(tmp_path):
    target = write_folder(tmp_path / "target", "text")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for name in ("link", "file", "missing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["target"] and names(target) == ["weights"]
    remove(target)
    assert names(tmp_path) == []
