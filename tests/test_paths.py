"""Paths: what cannot be is said before anything is done, and nothing is left."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest

import curvlab as cl
from curvlab.datasets import files
from curvlab.show import pictures
from curvlab.system import paths


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "the path '' cannot be: it is empty"),
        ("a\0b", r"the path 'a\\x00b' cannot be: it has a NUL character"),
        ("x" * 256, "has a name of 256 bytes, of at most 255"),
        ("é" * 128, "has a name of 256 bytes"),
        ("a/" * 3000, "has 6000 bytes, of at most 4000"),
        ("\ud83d", r"the path '\\ud83d' has a character that no path can have"),
        (3, "the path must be a path, not int"),
        (None, "the path must be a path, not NoneType"),
    ],
)
def test_what_no_path_can_be(path: object, says: str) -> None:
    with pytest.raises(cl.CurvlabError, match=says) as caught:
        paths.given(path)  # type: ignore[arg-type]  # wrong on purpose
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_what_a_path_can_be() -> None:
    for path in ("x" * 255, "é" * 127, "a/" * 1999, "\udcff", "a b", "$", Path("x")):
        assert paths.given(path) == Path(path)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "it is a folder"),
        ("dangling", "it is a symbolic link that leads nowhere"),
        ("loop", "[Ss]ymbolic links"),
        ("pipe", "it is a device or a pipe, no file"),
        ("nowhere/x", "there is no folder .*nowhere"),
        ("file/x", "file is a file, no folder"),
        ("file/x/y", "file is a file, no folder"),
        ("loop/x", "[Ss]ymbolic links"),
        ("dangling/x", "leads nowhere|no folder"),
    ],
)
def test_where_no_file_can_be_written(odd: Path, name: str, says: str) -> None:
    before = sorted(odd.rglob("*"))
    with pytest.raises(
        cl.CurvlabError, match=f"^the picture .* cannot be written: .*{says}.*; say another$"
    ):
        paths.check_file(odd / name, "picture", "say another")
    assert sorted(odd.rglob("*")) == before


def test_where_a_file_can_be_written(odd: Path) -> None:
    assert paths.check_file(odd / "new", "x") == odd / "new"
    assert paths.check_file(odd / "file", "x") == odd / "file"
    # what it leads to, which stays a link
    assert paths.check_file(odd / "link", "x") == odd / "file"
    assert not (odd / "new").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "is a file, no folder"),
        ("file/x/y", "file is a file, no folder"),
        ("dangling", "leads nowhere"),
        ("dangling/x", "leads nowhere"),
        ("loop", "[Ss]ymbolic links"),
        ("loop/x/y", "[Ss]ymbolic links"),
        ("/".join("d" * 101), "it has 101 new folders in one another, of at most 100"),
    ],
)
def test_where_no_folder_can_be_written(odd: Path, name: str, says: str) -> None:
    before = sorted(odd.rglob("*"))
    with pytest.raises(cl.CurvlabError, match=says):
        paths.check_folder(odd / name)
    assert sorted(odd.rglob("*")) == before


def test_what_stands_in_the_place_of_a_file(odd: Path) -> None:
    (odd / "folder" / "x.png").mkdir()
    with pytest.raises(
        cl.CurvlabError,
        match=re.escape(f"{odd / 'folder' / 'x.png'} cannot be written: it is a folder"),
    ):
        paths.check_folder(odd / "folder", ("x.svg", "x.png"))
    paths.check_folder(odd / "folder", ("x.svg",))
    paths.check_folder(odd / "/".join("d" * 100), ("x.svg",))
    assert not (odd / "d").exists()


def _fill(folder: Path, file: str) -> None:
    if file:
        (folder / file).touch()
    raise KeyError(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_of_others(odd: Path) -> None:
    (odd / "folder").chmod(0o500)
    for check in (partial(paths.check_file, what="file"), paths.check_folder):
        with pytest.raises(cl.CurvlabError, match=r"is not yours to write to|Permission denied"):
            check(odd / "folder" / "x")


def test_system_folders_that_take_no_folder() -> None:
    with pytest.raises(cl.CurvlabError, match="cannot be written"):
        paths.check_folder("/proc/nothing/x")


def test_folders_of_a_run_that_fails_go_again(tmp_path: Path) -> None:
    """Those that were made and are empty; not what was there, and not what holds something."""

    def made(name: str) -> Path:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    def fail(name: str, file: str = "") -> None:
        with pytest.raises(KeyError), paths.made(tmp_path / name, lambda: made(name)) as folder:
            _fill(folder, file)

    fail("a/b/c")
    assert not (tmp_path / "a").exists()
    fail("a/b/c", "log")
    assert (tmp_path / "a" / "b" / "c" / "log").exists()
    made("there")
    fail("there")
    assert (tmp_path / "there").is_dir()
    with paths.made(tmp_path / "good", lambda: made("good")):
        pass
    assert (tmp_path / "good").is_dir()
    with pytest.raises(KeyError), paths.made(None, lambda: made("runs/one"), tmp_path / "runs"):
        raise KeyError
    assert not (tmp_path / "runs").exists()


def test_users_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DATA", "~nosuch-user/data")
    monkeypatch.setenv("CURVLAB_CACHE", "~nosuch-user")
    with pytest.raises(
        cl.CurvlabError, match="CURVLAB_DATA is '~nosuch-user/data', and there is no such user"
    ):
        files.folders()
    with pytest.raises(
        cl.CurvlabError, match="CURVLAB_CACHE is '~nosuch-user', and there is no such user"
    ):
        files.cache()
    monkeypatch.setenv("CURVLAB_DATA", "x" * 300)
    with pytest.raises(
        cl.CurvlabError, match=r"the CURVLAB_DATA 'xxx.*' cannot be: it has a name of 300 bytes"
    ):
        files.file("a9a")


def test_pictures(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, says in (
        ("x", "has no suffix"),
        ("x.", "has no suffix"),
        (".png", "has no suffix"),
        ("x.xyz", "figures are not written as '.xyz' .known: .png, .svg, .pdf"),
        ("nowhere/x.png", "there is no folder"),
    ):
        with pytest.raises(cl.CurvlabError, match=says):
            pictures.check_picture(odd / name)
    monkeypatch.setenv("PATH", str(odd))
    with pytest.raises(cl.CurvlabError, match=r"'\.pgf' by .*tex, which is not there"):
        pictures.check_picture(odd / "x.pgf")
    for name in ("x.png", "x.PNG", "x.svg", "x.pdf"):
        assert pictures.check_picture(odd / name) == odd / name
