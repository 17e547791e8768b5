"""Where data files are looked for, checksums, downloads (from a server of the test's own), the
cache.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import curvlab as cl
from curvlab import datasets
from curvlab.datasets import FILES, File, files, images


def test_damaged_file_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = images._mnist_images
    monkeypatch.setattr(images, "_mnist_images", getattr(unpacked, "__wrapped__", unpacked))
    monkeypatch.setitem(
        datasets.DATASETS, "mnist16", replace(datasets.DATASETS["mnist16"], load=images.mnist16)
    )
    good = datasets.file("mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(good[:5000] + b"x" + good[5001:])
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(cl.CurvlabError, match=r"mnist\.npz is damaged .* reinstall"):
        cl.datasets.load("mnist16")
    (tmp_path / "mnist.npz").write_bytes(good)
    assert datasets.file("mnist.npz") == tmp_path / "mnist.npz"


def test_missing_file_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "absent.npz", File(("0" * 64,)))
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(
        cl.CurvlabError, match=f"absent.npz was not found in {tmp_path}, .*: set CURVLAB_DATA"
    ):
        datasets.file("absent.npz")


@pytest.mark.parametrize("name", ["news20", "cifar10-subset", "webspam"])
def test_a_set_without_its_file_names_file_and_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    with pytest.raises(
        cl.CurvlabError, match=r"data file \S+ was not found in .*: set CURVLAB_DATA to the folder"
    ):
        cl.datasets.load(name)


@pytest.mark.parametrize("published", ["md5", "sha256"])
def test_either_kind_of_checksum(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    right = hashlib.new(published, b"abc").hexdigest()
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setitem(FILES, "a", File(("0" * len(right), right)))  # one of several copies
    assert datasets.file("a") == tmp_path / "a"
    monkeypatch.setitem(FILES, "a", File(("0" * len(right),)))
    with pytest.raises(
        cl.CurvlabError,
        match=f"{'MD5' if published == 'md5' else 'SHA-256'} {right[:12]}.* get it again",
    ):
        datasets.file("a")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a file `a` that holds b"abc"; CURVLAB_CACHE is empty, CURVLAB_DATA has
    nothing.
    """
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a").write_bytes(b"abc")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "nothing"))
    yield f"http://127.0.0.1:{server.server_port}/a"
    server.shutdown()
    server.server_close()


def test_a_file_with_an_address_is_downloaded_once(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FILES, "a", File((hashlib.sha256(b"abc").hexdigest(),), served))
    path = datasets.file("a")
    assert path == tmp_path / "cache" / "a"
    assert path.read_bytes() == b"abc"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("curvlab: downloading a (0.0 MB) from http://127.0.0.1")
    assert datasets.file("a") == path
    assert capsys.readouterr().err == ""
    path.write_bytes(b"abx")  # damaged: got again
    assert datasets.file("a").read_bytes() == b"abc"


def test_a_download_with_another_checksum_is_refused_and_not_kept(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "a", File(("0" * 64,), served))
    with pytest.raises(
        cl.CurvlabError, match=r"could not be downloaded .*another checksum.*set CURVLAB_DATA"
    ):
        datasets.file("a")
    assert not (tmp_path / "cache" / "a").exists()


def test_no_network_is_one_line_with_the_remedy(
    served: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FILES, "a", File(("0" * 64,), "http://127.0.0.1:1/a"))
    with pytest.raises(
        cl.CurvlabError,
        match=r"a was not found in .* downloaded from \S+ to \S+ \(ConnectionError\): set",
    ) as info:
        datasets.file("a")
    assert "\n" not in str(info.value)
    assert capsys.readouterr().err == ""


def make() -> np.ndarray:
    return np.arange(12, dtype=np.uint8).reshape(3, 4)


def never() -> np.ndarray:
    raise AssertionError("made again")


def test_what_is_made_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "new" / "cache"))
    assert (files.cached("three", make) == make()).all()
    assert (files.cached("three", never) == make()).all()
    assert [p.name for p in (tmp_path / "new" / "cache").iterdir()] == ["three.npz"]


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "foreign"])
def test_a_damaged_copy_is_made_again_and_said(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path))
    files.cached("three", make)
    path = tmp_path / "three.npz"
    if damage == "other":  # whole, but not what was written
        with np.load(path) as archive:
            np.savez(path, images=archive["images"] + 1, sha256=archive["sha256"])
    else:
        path.write_bytes(
            {"cut": path.read_bytes()[:-30], "empty": b"", "foreign": b"no archive"}[damage]
        )
    with pytest.warns(cl.CurvlabWarning, match=r"three\.npz is damaged .*: made again"):
        assert (files.cached("three", make) == make()).all()
    assert (files.cached("three", never) == make()).all()


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(cl.CurvlabWarning, match="cannot be written .* set CURVLAB_CACHE"):
        assert (files.cached("three", make) == make()).all()


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(np, "savez", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.cached("three", make)
    assert list(tmp_path.iterdir()) == []
