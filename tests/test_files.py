import os

import pytest

from lora_kernels.files import replacing, replacing_files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_the_mode_follows_the_umask_whatever_the_writer_sets(tmp_path):
    previous = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.chmod(0o600)
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_files_in_folders_are_replaced_too(tmp_path):
    for text in ("old", "new"):
        with replacing_files(tmp_path, last="a") as staged:
            (staged / "folder" / "deep").mkdir(parents=True)
            for name in ("a", "folder/a", "folder/deep/b"):
                (staged / name).write_text(text)
                (staged / name).chmod(0o600)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a", "folder", "folder/a", "folder/deep", "folder/deep/b"
    ]  # fmt: skip
    mode = tmp_path.stat().st_mode & 0o666
    for name in ("a", "folder/a", "folder/deep/b"):
        assert (tmp_path / name).read_text() == "new" and (tmp_path / name).stat().st_mode & 0o777 == mode
