"""Files appear whole or not at all, and a disk that refuses them is told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from moba_train.data.files import published
from moba_train.errors import DataError
from tests.full_disk import full_disk


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with published(tmp_path / "folder" / "file") as aside:
        aside.write_text("text")
        assert not (tmp_path / "folder" / "file").exists()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["file/below", "folder", "/proc/none/file"])
def test_a_place_that_takes_no_file_is_named_and_nothing_is_left_there(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="the file cannot be written") as caught, published(tmp_path / place) as aside:
        aside.write_text("text")
    assert caught.value.where == str(tmp_path / place) and "Errno" in str(caught.value.got)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_full_disk_took_of_a_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="free space"), full_disk(10), published(tmp_path / "file") as aside:
        aside.write_text("more than ten bytes")
    assert not list(tmp_path.iterdir())
