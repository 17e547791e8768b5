"""`curvlab report`: the page read back by parsers, its numbers by another route, its calls by the
command line itself.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import xarray as xr
from matplotlib.figure import Figure
from test_cli import call, refused
from torch import nn

import curvlab as cl
from curvlab import datasets, probes
from curvlab.cli import app as cli
from curvlab.datasets import DataEntry, Dataset
from curvlab.models import MODELS
from curvlab.show import about, figures, tables
from curvlab.show.svg import inline

HOSTILE = "<b>&\"it's \\d"
"""The name of the runs' model."""
VOID = {"meta", "br", "hr", "img", "input", "link"}
COMPARE = [
    "compare",
    "--model",
    HOSTILE,
    "--reference",
    "kfac",
    "--algorithms",
    "tnt,sgd-m",
    "--batch-size",
    "20",
    "--steps",
    "8",
]
SPECTRUM = [
    "spectrum",
    "--model",
    HOSTILE,
    "--samples",
    "30",
    "--after",
    "0,2",
    "--batch-size",
    "20",
]
TRAIN = [
    "train",
    "--model",
    HOSTILE,
    "--batch-size",
    "20",
    "--epochs",
    "2",
    "--schedule",
    "step",
    "--schedule-set",
    "every=1",
]
RUNS = {
    "compare": [*COMPARE, "--seeds", "2"],
    "spectrum": SPECTRUM,
    "kfac": [*TRAIN, "--algorithm", "kfac", "--set", "split=even", "--no-augment", "--lr", "0.01"],
    "adam": [*TRAIN, "--algorithm", "adam", "--no-warm-start"],
}


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 6, generator=generator), torch.randint(3, (60,), generator=generator)
    data = Dataset("tiny", x, y, "sixty <examples> & no more")
    model = replace(
        MODELS["mlp-256-20"],
        data="tiny",
        build=lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "tiny", DataEntry("tiny", lambda: (data, data)))
        patch.setitem(MODELS, HOSTILE, model)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _tiny: None) -> Path:
    """Folders of every kind of run, of which adam's was gone on with, and the report on all of
    them.
    """
    folder = tmp_path_factory.mktemp("report")
    for name, words in RUNS.items():
        assert call(*words, "--out", str(folder / name)) == 0
    assert call("train", "--resume", "--out", str(folder / "adam"), "--epochs", "3") == 0
    assert (
        call("report", *(str(folder / name) for name in RUNS), "-o", str(folder / "all.html")) == 0
    )
    return folder


class Page(HTMLParser):
    """Every element with its attributes and text; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.inside: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.elements.append((tag, {k: v or "" for k, v in attrs}, texts))
        if tag not in VOID:
            self.open.append(tag)
            self.inside.append(texts)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside.pop()

    def handle_data(self, data: str) -> None:
        for texts in self.inside:
            texts.append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, "".join(texts)) for name, attrs, texts in self.elements if name == tag]

    def tables(self) -> dict[str, list[list[str]]]:
        """{caption: rows of cells}; of several with one caption the last."""
        found: dict[str, list[list[str]]] = {}
        caption = ""
        for tag, _, texts in self.elements:
            if tag == "caption":
                caption = "".join(texts)
                found[caption] = []
            elif tag == "tr":
                found[caption].append([])
            elif tag in ("td", "th"):
                found[caption][-1].append("".join(texts))
        return found


@pytest.fixture(scope="module")
def text(runs: Path) -> str:
    return (runs / "all.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_figure_of_every_log_is_there_as_well_formed_svg(
    runs: Path, text: str, page: Page
) -> None:
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    logs = [cl.open(runs / name) for name in RUNS]
    single = [name for ds in logs for name, entry in figures.FIGURES.items() if entry.needs in ds]
    assert sorted(single) == [
        "cosine",
        "loss",
        "loss",
        "seconds",
        "spectrum",
        "training",
        "training",
    ]
    # and the two training runs together
    assert len(found) == len(page.of("figure")) == len(single) + 1
    assert all(len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) > 10 for svg in found)
    labels = [svg.get("aria-label") for svg in found]
    assert len(set(labels)) == len(labels)
    assert all(svg.get("role") == "img" and svg.get("viewBox") for svg in found)


def test_ids_are_unique_and_every_reference_finds_one(text: str, page: Page) -> None:
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    hrefs = [attrs["href"] for _, attrs, _ in page.elements if "href" in attrs]
    assert hrefs
    assert all(href.startswith("#") for href in hrefs)
    urls = re.findall(r"url\(([^)]*)\)", text)
    assert urls
    assert {href[1:] for href in hrefs} | {url[1:] for url in urls} <= set(ids)
    assert all(
        attrs[name] in ids
        for _, attrs, _ in page.elements
        for name in ("aria-labelledby",)
        if name in attrs
    )


def test_nothing_is_fetched_from_anywhere(text: str, page: Page) -> None:
    used = {tag for tag, _, _ in page.elements}
    assert not used & {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "foreignobject",
    }
    assert not {name for _, attrs, _ in page.elements for name in attrs} & {
        "src",
        "srcset",
        "style:url",
        "onload",
        "onclick",
    }
    assert "@import" not in text
    assert "@font-face" not in text
    addresses = set(re.findall(r"https?://[^\s\"'<]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    policy = [
        attrs["content"]
        for attrs, _ in page.of("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]  # and the browser is told so


def test_names_are_escaped(text: str, page: Page) -> None:
    assert "<b>&" not in text
    assert "<examples>" not in text
    assert {t for _, t in page.of("b")} == {f"Figure {i}." for i in range(1, 9)}
    assert page.tables()["What all runs share"][0] == ["model", HOSTILE]
    assert page.tables()["What all runs share"][1] == ["data", "tiny (sixty <examples> & no more)"]


def test_it_can_be_read_aloud_and_printed(text: str, page: Page) -> None:
    assert page.of("html")[0][0]["lang"] == "en"
    assert page.of("title")[0][1] == page.of("h1")[0][1] == "curvlab report: 4 runs"
    heads = [attrs.get("scope") for attrs, _ in page.of("th")]
    assert set(heads) == {"row", "col"}
    assert len(page.of("caption")) == len(page.of("table"))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    style = page.of("style")[0][1]
    printed = style[style.index("@media print") :]
    assert "details::details-content { display: block; content-visibility: visible;" in printed
    assert re.search(r"figure \{[^}]*break-inside: avoid", style)
    assert "attr(href)" not in style


def test_contrast_is_enough_in_light_and_dark(page: Page) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 : 1."""

    def luminance(colour: str) -> float:
        parts = np.asarray([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", page.of("style")[0][1], re.S)
    ]
    assert len(themes) == 2
    for colours in themes:
        pairs = [(front, "paper") for front in ("ink", "faint", "link", "warn")] + [
            ("ink", "shade"),
            ("warn", "warned"),
        ]
        for front, back in pairs:
            light, dark = sorted(
                (luminance(colours[front]), luminance(colours[back])), reverse=True
            )
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_the_same_logs_give_the_same_bytes(runs: Path, text: str, tmp_path: Path) -> None:
    """In another process, with other hashes, on another day."""
    words = [
        sys.executable,
        "-m",
        "curvlab",
        "report",
        *(str(runs / name) for name in RUNS),
        "-o",
        str(tmp_path / "again.html"),
    ]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "SOURCE_DATE_EPOCH": "0",
        "TZ": "Asia/Tokyo",
    }
    subprocess.run(words, check=True, capture_output=True, env=environment)
    assert (tmp_path / "again.html").read_bytes() == text.encode()


def test_the_numbers_are_the_logs(runs: Path, page: Page) -> None:
    """Means and deviations by NumPy."""
    found = page.tables()
    ds = cl.open(runs / "compare")
    late = ds["cosine"].transpose("algorithm", "block", "seed", "step").values[..., 2:].mean(-1)
    rows = found[
        "Mean cosine to kfac over the last three quarters of the steps, mean ± standard deviation"
        " of 2 seeds"
    ]
    assert rows[0] == ["algorithm", "layer 1", "layer 2"]
    for row, values in zip(rows[1:], late[1:], strict=True):
        assert row[1:] == [f"{v.mean():.3f} ± {v.std():.3f}" for v in values]
    assert [row[0] for row in rows[1:]] == ["tnt", "sgd-m"]

    ds = cl.open(runs / "spectrum")
    rows = found["Eigenvalues (nat; ± error where Lanczos estimates them)"]
    assert len(rows) == 1 + 2 * 2 * 2
    for block, matrix, steps, lowest, highest, trace, negative in rows[1:]:
        values = ds["eigenvalue"].sel(block=block, matrix=matrix, step=int(steps)).values
        values = values[np.isfinite(values)]
        assert [float(lowest), float(highest), float(trace)] == pytest.approx(
            [values[0], values[-1], values.sum()], rel=1e-3
        )
        share = (values < -1e-10 * np.abs(values).max()).mean()
        assert negative == (f"{share:.1%}" if share else "0")

    rows = found["The last epoch of each run"]
    assert rows[0][:5] == ["run", "epoch", "steps", "train loss (nat)", "val loss (nat)"]
    for row, name, number, epochs in zip(rows[1:], ("kfac", "adam"), (3, 4), (2, 3), strict=True):
        last = cl.open(runs / name).isel(epoch=-1)
        assert row[:3] == [f"{number}. {name}", str(epochs), str(3 * epochs)]
        assert row[3] == f"{last['train_loss'].item():.5g}"
    assert [row[0] for row in found["By block, at epoch 3"]] == ["block", "1", "2"]


def test_calls_versions_and_attributes_are_all_there(runs: Path, page: Page) -> None:
    texts = [t for _, t in page.of("pre")]
    for name in RUNS:
        ds = cl.open(runs / name)
        assert [t for _, t in about.calls(ds)] == [t for t in texts if str(runs / name) in t]
        for key, value in ds.attrs.items():
            assert any(row == [key, str(value)] for row in rows_of(page)), (name, key)
        for library, version in json.loads(ds.attrs["versions"]).items():
            assert [library, version] in rows_of(page)


def rows_of(page: Page) -> list[list[str]]:
    found: list[list[str]] = []
    for tag, _, texts in page.elements:
        if tag == "tr":
            found.append([])
        elif tag in ("td", "th"):
            found[-1].append("".join(texts))
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line understands, in a log's words."""
    assert words[0] == "curvlab"
    command = typer.main.get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]  # a group
    params = dict(command.make_context(words[1], words[2:]).params)
    assert not params.pop("verbose")  # what is printed is no part of a run
    out = params.pop("out_folder")
    return {
        "command": words[1],
        **{k: None if v == () else v for k, v in params.items()},
        "out": str(out or ""),
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_call_is_what_was_typed(runs: Path, name: str) -> None:
    ds = cl.open(runs / name)
    given = json.loads(ds.attrs["call"])
    (_, said), *_ = about.calls(ds)
    assert max(map(len, said.splitlines())) <= 94
    assert parsed(shlex.split(said.replace("\\\n", ""))) == given
    assert given["model"] == HOSTILE


def test_a_call_that_went_on_names_only_what_it_could_change(runs: Path) -> None:
    ds = cl.open(runs / "adam")
    first, (what, again) = about.calls(ds)
    assert first[0] == ""
    assert what.startswith("and to go on, at 20")
    words = shlex.split(again.replace("\\\n", ""))
    assert parsed(words) == json.loads(json.loads(ds.attrs["resumed"])[0]["call"])
    assert set(words) >= {"--resume", "--epochs", "--out"}
    assert "--algorithm" not in words


def test_a_call_from_python_reads_as_one(tmp_path: Path) -> None:
    call_ = {"function": "curvlab.train", "batches": "a <b>", "folder": None, "resume": False}
    assert about.shell(call_) == "curvlab.train(batches='a <b>', folder=None, resume=False)"
    assert about.calls(xr.Dataset()) == []


def test_the_length_of_compare_is_the_command_lines() -> None:
    group: Any = typer.main.get_command(cli.app)
    (option,) = (p for p in group.commands["compare"].params if p.name == "steps")
    assert str(option.help).startswith(f"Steps; {about.STEPS_OF_COMPARE} unless")


def test_what_a_reader_should_know(runs: Path, page: Page) -> None:
    said = [
        t
        for attrs, t in page.of("li")
        if "href" not in attrs and t.startswith(("Went on", "Stopped", "Not complete"))
    ]
    assert len(said) == 1
    assert said[0].startswith("Went on at 20")
    ds = cl.open(runs / "adam")
    assert about.unfinished(ds) == ""
    assert about.unfinished(ds.isel(epoch=slice(2))) == "1 of 3 epochs"
    asked = ds.assign_attrs(budget=json.dumps({"epochs": None, "steps": 9, "seconds": 100.0}))
    assert about.unfinished(asked) == ""
    assert re.fullmatch(
        r"6 of 9 steps, [\d.e-]+ of 100 seconds", about.unfinished(asked.isel(epoch=slice(3)))
    )
    assert (
        about.notes(ds.assign_attrs(stopped="diverged", git_commit="abc+changes"))[0]
        == "Stopped: diverged."
    )
    assert about.notes(ds.assign_attrs(git_commit="abc+changes"))[-1].startswith(
        "Ran from a checkout with changes"
    )
    moved = json.dumps(
        [
            {
                "created": "2030-01-01T00:00:00+00:00",
                "versions": '{"torch": "9"}',
                "git_commit": "f00",
            }
        ]
    )
    assert about.notes(ds.assign_attrs(resumed=moved, git_commit="abc")) == [
        "Went on at 2030-01-01 00:00:00 UTC, by torch 9, commit f00."
    ]


def test_comparisons_and_spectra_that_did_not_end(runs: Path) -> None:
    ds = cl.open(runs / "compare")
    assert about.unfinished(ds) == ""
    assert about.unfinished(ds.isel(step=slice(5))) == "5 of 8 steps"
    assert about.unfinished(ds.isel(seed=[0])) == "no record of seed 1"
    assert (
        about.unfinished(ds.where((ds["seed"] == 0) | (ds["step"] < 4)))
        == "not every seed reached the last step"
    )
    call_ = json.loads(ds.attrs["call"])
    default = ds.assign_attrs(call=json.dumps(call_ | {"steps": None}))
    assert about.unfinished(default) == "8 of 300 steps"
    # the log cannot tell
    assert (
        about.unfinished(ds.assign_attrs(call=json.dumps(call_ | {"steps": None, "epochs": 9})))
        == ""
    )
    rarely = json.loads(ds.attrs["settings"]) | {"log_every": 4}
    assert about.unfinished(ds.isel(step=[0, 4]).assign_attrs(settings=json.dumps(rarely))) == ""
    spectra = cl.open(runs / "spectrum")
    assert about.unfinished(spectra) == ""
    assert about.unfinished(spectra.isel(step=[0])) == "no spectra after 2 steps"


def test_one_run_alone_and_in_another_order(runs: Path, tmp_path: Path) -> None:
    """The file in the place of the folder, one run, and the default name beside the log."""
    assert call("report", str(runs / "kfac" / "run.h5")) == 0
    one = Page((runs / "kfac" / "report.html").read_text())
    assert one.of("h1")[0][1] == "curvlab train: kfac"
    assert len(one.of("figure")) == 1
    assert ["algorithm", "kfac"] in one.tables()["The run"]
    assert one.of("nav") == []
    path = cl.report([runs / "adam", runs / "compare", runs / "adam"], tmp_path / "two.html")
    assert path == tmp_path / "two.html"
    titles = [t for _, t in Page(path.read_text()).of("h2")]
    assert titles == [
        "Summary",
        "1. curvlab train: adam",
        "2. curvlab compare: directions against kfac",
    ]


def test_runs_of_other_problems_are_not_drawn_together(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    cl.open(runs / "adam").assign_attrs(data_description="other examples").to_netcdf(
        other, engine="h5netcdf"
    )
    titles = [
        t
        for _, t in Page(
            cl.report([runs / "adam", runs / "kfac", other], tmp_path / "a.html").read_text()
        ).of("h2")
    ]
    assert [t for t in titles if t.startswith("Together")] == [
        f"Together: 2 runs of {HOSTILE} on tiny"
    ]


def probed() -> xr.Dataset:
    """What a probe may log: an axis of its own, labels of its own, flags, one number everywhere, no
    number anywhere.
    """
    rng = np.random.default_rng(0)
    each, label = (
        ("damping_step", "algorithm", "block", "pair"),
        {"long_name": "of a pair", "units": "1"},
    )
    theta = rng.uniform(0.1, 1, (3, 2, 2, 2))
    theta[:, 1] = np.nan
    theta[2, :, 1] = np.nan
    skipped = np.where(np.isnan(theta), np.nan, 1.0)
    skipped[0] = 0
    norm = rng.uniform(1, 2, (4, 2, 2))
    return xr.Dataset(
        {
            "theta": (each, theta, label),
            "skipped": (
                each,
                skipped,
                label | {"flag_values": "0 1", "flag_meanings": "used; too <small>"},
            ),
            "phi": (
                ("step", "block"),
                rng.uniform(1, 2, (4, 2)),
                {"long_name": "bound", "units": "nat"},
            ),
            "flat": (
                ("step", "block"),
                np.full((4, 2), 3.0),
                {"long_name": "level", "units": "nat"},
            ),
            "none": (
                ("step", "block"),
                np.full((4, 2), np.nan),
                {"long_name": "void", "units": "1"},
            ),
            "norm": (
                ("step", "algorithm", "block"),
                norm,
                {"long_name": "norm of something", "units": "parameter"},
            ),
            "gram": (
                ("step", "algorithm", "other", "block"),
                np.ones((4, 2, 2, 2)),
                {"long_name": "product", "units": "1"},
            ),
            "loss": ("step", np.arange(4.0), {"long_name": "loss", "units": "nat"}),
            "bare": (("step", "block"), norm[..., 0]),
        },
        {
            "algorithm": ["k-bfgs", "adam"],
            "other": ["k-bfgs", "adam"],
            "block": ["1", "2"],
            "pair": ["a", "g"],
            "step": [0, 1, 2, 3],
            "damping_step": [0, 10, 20],
        },
    )


def test_what_probes_log_becomes_tables() -> None:
    ds = probed()
    found, left = tables.at_the_end(ds)
    by = {table.caption: table for table in found}
    assert set(by) == {
        "By algorithm, block, pair, at damping_step 20",
        "By block, at step 3",
        "norm (parameter), at step 3",
    }
    pairs = by["By algorithm, block, pair, at damping_step 20"]
    assert pairs.columns == ("algorithm", "block", "pair", "theta", "skipped")
    at = ds["theta"].sel(damping_step=20, algorithm="k-bfgs", block="1")
    assert pairs.rows == tuple(
        ("k-bfgs", "1", p, f"{at.sel(pair=p).item():.4g}", "too <small>") for p in ("a", "g")
    )
    assert pairs.heads == 3
    assert pairs.notes == (("theta", "of a pair"), ("skipped", "of a pair"))
    grid = by["norm (parameter), at step 3"]
    assert grid.columns == ("algorithm", "layer 1", "layer 2")
    assert grid.rows == tuple(
        (a, *(f"{v:.4g}" for v in ds["norm"].sel(step=3, algorithm=a).values))
        for a in ("k-bfgs", "adam")
    )
    assert by["By block, at step 3"].columns == ("block", "phi (nat)")
    assert dict(left) == {
        "flat": "level: 3 nat everywhere",
        "none": "void: not a number anywhere",
        "gram": "product: in the log alone",
    }


def test_the_last_place_is_the_last_that_is_known() -> None:
    ds = probed()
    ds["phi"][2:] = np.nan
    (table,) = (t for t in tables.at_the_end(ds[["phi"]])[0])
    assert table.caption == "By block, at step 1"
    assert table.rows == tuple((b, f"{ds['phi'].sel(step=1, block=b).item():.4g}") for b in "12")


def test_many_blocks_go_down_and_tables_without_end_stay_in_the_log() -> None:
    values = np.random.default_rng(1).normal(size=(1, 2, 40))
    label = {"long_name": "something", "units": "1"}
    coords = {"step": [0], "algorithm": ["a", "b"], "block": [str(i) for i in range(40)]}
    ds = xr.Dataset({"v": (("step", "algorithm", "block"), values, label)}, coords)
    (table,), _ = tables.at_the_end(ds)
    assert table.columns == ("block", "a", "b")
    assert table.rows[7] == ("7", f"{values[0, 0, 7]:.4g}", f"{values[0, 1, 7]:.4g}")
    long = xr.Dataset(
        {"v": (("step", "block"), np.random.default_rng(2).normal(size=(1, 501)), label)},
        {"step": [0]},
    )
    assert tables.at_the_end(long) == ([], [("v", "something: 501 rows, in the log alone")])


@pytest.mark.parametrize("prefix", ["f1-", "other-"])
def test_an_svg_keeps_its_references_under_the_prefix(prefix: str) -> None:
    figure = Figure()
    ax = figure.subplots()
    ax.plot([0, 1], [1, 3], marker="o", label='a < b & "c"')
    ax.imshow(np.eye(3))
    ax.legend()
    svg = ET.fromstring(inline(figure, prefix, 'x < y & "z"'))
    assert svg.get("aria-label") == 'x < y & "z"'
    ids = {e.get("id") for e in svg.iter() if e.get("id")}
    used = {e.get("href", "")[1:] for e in svg.iter() if e.get("href", "").startswith("#")}
    used |= {
        name
        for e in svg.iter()
        for v in e.attrib.values()
        for name in re.findall(r"url\(#(.*?)\)", v)
    }
    assert used == ids
    assert all(str(name).startswith(prefix) for name in ids)
    assert not any(e.tag.endswith(("metadata", "style")) for e in svg.iter())
    images = [e.get("href") for e in svg.iter() if e.tag.endswith("image")]
    assert [str(image)[:22] for image in images] == ["data:image/png;base64,"]
    assert inline(figure, prefix, "x") == inline(figure, prefix, "x")


def test_the_legend_of_many_runs_stands_within_the_figure(runs: Path) -> None:
    ds = cl.open(runs / "adam")
    many = [
        (str(i), ds.assign_attrs(lr=10.0**-i, damping=0.123 / (i + 1), seed=i)) for i in range(14)
    ]
    many[1] = ("1", many[1][1].assign_attrs(lr=1.0))  # so that damping and seed are named too
    figure = figures.draw_all(many, "training")
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert min(ax.get_window_extent().height for ax in figure.axes) > 150
    lines = [line for line in figure.axes[0].lines if str(line.get_label()).endswith("training")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 14


def test_a_report_that_cannot_be_written_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs / "adam")
    (tmp_path / "folder.html").mkdir()
    assert "it is a folder" in refused(capsys, "report", run, "-o", str(tmp_path / "folder.html"))
    assert "there is no folder /nowhere" in refused(capsys, "report", run, "-o", "/nowhere/a.html")
    assert "reports are HTML, not '.png'; call it a.html" in refused(
        capsys, "report", run, "-o", str(tmp_path / "a.png")
    )
    log = tmp_path / "log.html"
    log.write_bytes((runs / "adam" / "run.h5").read_bytes())
    assert "it is one of the logs" in refused(capsys, "report", str(log), "-o", str(log))
    assert cl.open(log).attrs["algorithm"] == "adam"
    with pytest.raises(cl.CurvlabError, match="no run to report on"):
        cl.report([], tmp_path / "a.html")
    assert "Missing argument" in refused(capsys, "report")


def test_a_log_that_cannot_be_read_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "a.html")]
    assert "no log at" in refused(
        capsys, "report", str(runs / "adam"), str(tmp_path / "absent"), *out
    )
    (tmp_path / "run.h5").write_bytes((runs / "adam" / "run.h5").read_bytes()[:3000])
    assert "is damaged" in refused(capsys, "report", str(tmp_path), *out)
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "other.h5", engine="h5netcdf")
    assert "no curvlab log" in refused(capsys, "report", str(tmp_path / "other.h5"), *out)
    assert not (tmp_path / "a.html").exists()


def test_a_disk_that_is_full_leaves_the_old_page(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.html"
    target.write_text("old")

    def full(path: Path, *_: object, **__: object) -> int:
        path.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        cl.CurvlabError, match=r"a\.html cannot be written: No space left on device"
    ):
        cl.report(runs / "adam", target)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.html", b"old")]


def test_it_shows_how_far_it_is(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = cl.open(runs / "compare").assign_attrs(title="[/x] is no markup of the console's")
    log.to_netcdf(tmp_path / "run.h5", engine="h5netcdf")
    cl.report(tmp_path, tmp_path / "a.html", progress=True)
    assert re.search(r"figures .*3/3", capsys.readouterr().err)
    cl.report(runs / "adam", tmp_path / "a.html", progress=False)
    assert capsys.readouterr().err == ""


def test_a_log_from_python_and_one_that_says_little(tmp_path: Path) -> None:
    """The public functions' logs; attributes that are absent are dashes, not errors."""
    train, _ = cl.datasets.load("tiny")
    objective = cl.Objective(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        cl.likelihoods.Categorical(),
        seed=0,
    )
    cl.compare(
        objective,
        train.batches(20),
        reference="sgd-m",
        algorithms=["adam"],
        path=tmp_path / "run.h5",
        progress=False,
    )
    text = cl.report(tmp_path, tmp_path / "a.html").read_text()
    assert "curvlab.compare(batches=&#39;tiny, batches of 20" in text
    ds = cl.open(tmp_path)
    ds.attrs = {"versions": ds.attrs["versions"], "reference": "sgd-m"}
    ds.to_netcdf(tmp_path / "bare.h5", engine="h5netcdf")
    bare = Page(cl.report(tmp_path / "bare.h5", tmp_path / "b.html").read_text())
    assert ["model", "–"] in bare.tables()["The run"]
    assert bare.of("pre") == []


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, _tiny: None) -> Path:
    """A training run with every probe, one whose method no theorem bounds, comparisons that were
    killed early.
    """
    folder = tmp_path_factory.mktemp("odd")
    every = [
        word
        for name in probes.PROBES
        if "train" in probes.PROBES[name].where and name != "shift"
        for word in ("--probe", f"{name}:2")
    ]
    assert (
        call(
            *TRAIN,
            "--algorithm",
            "k-bfgs-20-convergent",
            "--damping",
            "0.3",
            *every,
            "--out",
            str(folder / "every"),
        )
        == 0
    )
    assert (
        call(*TRAIN, "--algorithm", "kfac", "--probe", "bounds:1", "--out", str(folder / "kfac Ω"))
        == 0
    )
    assert (
        call(*COMPARE, "--seeds", "3", "--probe", "noise:2", "--out", str(folder / "compare")) == 0
    )
    first = cl.open(folder / "compare").isel(step=[0], noise_step=[0], seed=[0])
    (folder / "killed").mkdir()
    first.to_netcdf(folder / "killed" / "run.h5", engine="h5netcdf")
    return folder


def test_odd_runs_are_reported(odd: Path) -> None:
    names = ["every", "kfac Ω", "killed"]
    for name in names:
        assert call("report", str(odd / name), "-o", str(odd / f"{name}.html")) == 0
    pages = {name: Page((odd / f"{name}.html").read_text(encoding="utf-8")) for name in names}
    words = {
        name: " ".join(
            text for tag in ("h2", "caption", "td", "th", "dd") for _, text in page.of(tag)
        )
        for name, page in pages.items()
    }
    for said in words.values():
        assert "By ," not in said
        assert "-0.0 " not in said
    found = pages["every"].tables()
    every = cl.open(odd / "every")
    last = float(every["reduction_actual"][-1, 0])
    assert found[f"At reduction_step {int(every['reduction_step'][-1])}"][1:] == [[f"{last:.4g}"]]
    training, validation = (f"{float(every[f'{part}_loss'][-1]):.5g}" for part in ("train", "val"))
    assert f"training {training}, validation {validation} nat" in words["every"]
    assert len(pages["every"].of("figure")) == 3  # training, the loss of minibatches, pairs
    assert found["Bounds of the theorems: looseness in orders of magnitude (0: tight)"][1:]
    assert pages["kfac Ω"].tables()["No theorem bounds these eigenvalues"] == [[""]]
    assert "1 step" in words["killed"]
    notes = "".join(text for _, text in pages["killed"].of("li"))
    assert "no record of seed 1, 2; 1 of 8 steps" in notes
    assert not re.search(r"1 steps|±|of 1 seeds|mean of the seeds", words["killed"])


def test_what_was_seen_once_is_seen(odd: Path) -> None:
    """A line through one point is none."""
    for name, log in (("cosine", odd / "killed"), ("damping", odd / "every")):
        ds = cl.open(log)
        at = ds if name == "cosine" else ds.isel(epoch=slice(1, 2))
        lines = [
            line
            for ax in figures.draw(at, name).axes
            for line in ax.lines
            if np.isfinite(line.get_ydata()).any()
        ]
        assert lines
        assert all(line.get_marker() == "." for line in lines)


def test_ticks_of_a_narrow_logarithmic_axis_differ(odd: Path) -> None:
    ds = cl.open(odd / "every")
    for name in ("train_error", "val_error", "train_loss", "val_loss"):
        ds[name][:] = np.linspace(0.874, 0.884, ds.sizes["epoch"])
    figure = figures.draw(ds, "training")
    figure.draw_without_rendering()
    for ax in figure.axes[::2]:
        shown = [tick.get_text() for tick in ax.get_yticklabels(which="both") if tick.get_text()]
        assert len(shown) > 2
        assert len(set(shown)) == len(shown)


def test_the_title_of_a_narrow_figure_stands_within_it(odd: Path) -> None:
    ds = cl.open(odd / "every").assign_attrs(model="a-network-with-a-name", data="some-data")
    figure: Any = figures.draw(ds, "damping")
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] < 5
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 <= box.x1 <= figure.bbox.width


def test_every_cosine_is_within_its_panel(odd: Path) -> None:
    ds = cl.open(odd / "compare")
    for low in (0.9, 0.2, -0.95):
        values = np.linspace(0.9, 1.0, ds["cosine"].size).reshape(ds["cosine"].shape)
        at = ds.assign(cosine=ds["cosine"].copy(data=values))
        at["cosine"].loc[{"block": ds["block"][-1]}] = low
        figure = figures.draw(at, "cosine")
        for ax in figure.axes:
            bottom, top = ax.get_ylim()
            drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
            assert top == 1.0
            assert bottom <= drawn.min()
