import os

import pytest

from lora_kernels.io.files import replacing


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
