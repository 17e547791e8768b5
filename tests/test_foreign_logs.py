"""Logs that are not ours and text from outside: a full result or one line, nothing written beside
it.

Real small logs of every command are damaged one thing at a time, every attribute, variable,
coordinate and dimension.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from test_cli import call
from torch import nn

import curvlab as cl
from curvlab import probes
from curvlab.cli import terminal
from curvlab.datasets import Dataset
from curvlab.errors import CurvlabError
from curvlab.logs import attributes
from curvlab.logs.log import SCHEMA, Log, in_memory
from curvlab.logs.regular import regular, unique
from curvlab.show import about, figures, svg, tables
from curvlab.show.drawable import picture
from curvlab.show.page import page
from curvlab.system.atomic import rewrite_sealed
from curvlab.system.escape import LONGEST, for_html, for_matplotlib, for_rich, for_terminal, for_xml
from curvlab.system.progress import progress_bar

KINDS = ("train", "compare", "spectrum")
Damage = Callable[..., xr.Dataset]
"""Of a data set."""
pytestmark = pytest.mark.filterwarnings(
    "error",
    "default::curvlab.errors.CurvlabWarning",
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
)
READ = {
    "cosine": ("cosine", "parameters", "step", "algorithm", "block", "seed"),
    "loss": ("loss", "loss_step"),
    "seconds": ("seconds", "algorithm"),
    "spectrum": (
        "lowest",
        "highest",
        "density",
        "order",
        "lower",
        "upper",
        "unresolved",
        "negative",
        "route",
        "loss",
        "step",
        "matrix",
        "block",
    ),
    "training": ("train_loss", "val_loss", "train_error", "wall_seconds", "epoch"),
    "damping": (
        "pairs_within_mu1",
        "pairs_within_2mu1",
        "pair_curvature_mean",
        "pair",
        "stage",
        "block",
    ),
}
"""{figure: what it reads}"""


@pytest.fixture(scope="module")
def logs() -> dict[str, xr.Dataset]:
    """One of every command, made once; with the attributes that the command line adds."""
    generator = torch.Generator().manual_seed(0)
    data = Dataset(
        "tiny",
        torch.rand(60, 6, generator=generator),
        torch.randint(3, (60,), generator=generator),
        "sixty",
    )

    def objective() -> cl.Objective:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        return cl.Objective(model, cl.likelihoods.Categorical(), seed=0)

    names = [
        f"{name}:2"
        for name, probe in probes.PROBES.items()
        if "train" in probe.where and name != "shift"
    ]
    train = cl.train(
        objective(),
        data.batches(20, seed=0),
        data,
        algorithm="k-bfgs-20-convergent",
        damping=0.3,
        epochs=2,
        probes=names,
        progress=False,
    ).dataset
    one, two = (
        cl.compare(
            objective(),
            data.batches(20, epochs=2, seed=seed),
            reference="kfac",
            algorithms=["tnt", "sgd-m"],
            progress=False,
        )
        for seed in (0, 1)
    )
    compare = xr.concat(
        [one.dataset, two.dataset],
        xr.DataArray([0, 1], dims="seed", name="seed"),
        combine_attrs="override",
    )
    spectra = [
        cl.spectrum(objective(), data.x[:30], data.y[:30], after=after, progress=False)
        for after in (0, 2)
    ]
    spectrum = xr.concat(spectra, "step", data_vars="minimal", combine_attrs="override")
    again = {
        "created": "2026-01-01",
        "versions": json.dumps({"curvlab": "0"}),
        "git_commit": "x",
        "call": json.dumps({"command": "train"}),
    }
    calls = {
        "train": {
            "command": "train",
            "model": "m",
            "epochs": 2,
            "steps": None,
            "out": "o",
            "resume": False,
            "probe": names,
        },
        "compare": {"command": "compare", "model": "m", "steps": 6, "epochs": None, "seeds": 2},
        "spectrum": {"command": "spectrum", "model": "m", "after": "0,2"},
    }
    found = {"train": train, "compare": compare, "spectrum": spectrum}
    more = {
        "train": {"resumed": json.dumps([again])},
        "compare": {"seed": "[0, 1]"},
        "spectrum": {"algorithm": "adam"},
    }
    return {
        kind: ds.assign_attrs({"call": json.dumps(calls[kind])} | more[kind])
        for kind, ds in found.items()
    }


@pytest.fixture(scope="module")
def small(logs: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Of training what figures and tables ask for by name, and a few that they find."""
    known = {name for names in READ.values() for name in names}
    kept = {"steps", "tightness_low", "tightness_high", "pair_skipped", "condition"}
    kept |= {f"update_{what}_{which}" for what in ("norm", "bound") for which in "BH"}
    train = logs["train"]
    return logs | {"train": train[[str(name) for name in train.data_vars if name in known | kept]]}


ODD_VALUES: dict[str, object] = {
    "empty": "",
    "no JSON": "{",
    "JSON of another type": "[1",
    "null": "null",
    "a list": "[]",
    "an object": "{}",
    "hostile": "$x\x00\x1b[31m\ud800[/b]<i>\u202e%s\\",
    "a number": 3,
    "NaN": float("nan"),
    "an array": np.arange(3.0),
    "words": np.array(["a", "b"]),
    "huge": "x" * 100_000,
    "deep": "[" * 200_000,
    "bytes": b"abc",
    "beyond floats": 10**400,
}
NESTED = (None, "x", [1], {"a": 1}, 1.5, -1, 1e308, float("nan"), True, 10**400)


def of_attributes(ds: xr.Dataset) -> Iterator[tuple[str, Damage]]:
    """Every attribute: absent, another value; every entry of those that are JSON likewise."""
    for name in map(str, ds.attrs):
        yield (
            f"{name} absent",
            lambda d, n=name: d.drop_attrs(deep=False).assign_attrs(
                {k: v for k, v in d.attrs.items() if k != n}
            ),
        )
        for what, value in ODD_VALUES.items():
            yield f"{name}: {what}", lambda d, n=name, v=value: d.assign_attrs({n: v})
        whole = attributes._parsed(ds.attrs[name])
        entries = (
            whole[0] if isinstance(whole, list) and whole and isinstance(whole[0], dict) else whole
        )
        for key, value in itertools.product(entries, NESTED) if isinstance(entries, dict) else ():
            text = json.dumps(
                [entries | {key: value}] if isinstance(whole, list) else entries | {key: value}
            )
            yield (
                f"{name}[{key}]: {str(value)[:20]}",
                lambda d, n=name, t=text: d.assign_attrs({n: t}),
            )


def filled(value: object) -> Callable[[xr.Variable], xr.Variable]:
    return lambda v: xr.Variable(
        v.dims, np.full(v.shape, value, dtype=object if isinstance(value, str) else None), v.attrs
    )


def random(v: xr.Variable) -> xr.Variable:
    rng = np.random.default_rng(0)
    return xr.Variable(
        v.dims, rng.normal(size=v.shape) * 10.0 ** rng.integers(-300, 300, v.shape), v.attrs
    )


def swinging(v: xr.Variable) -> xr.Variable:
    return xr.Variable(v.dims, np.resize([1e308, -1e308], v.shape).astype(float), v.attrs)


ODD_ATTRIBUTES = {"long_name": 3, "units": np.arange(2), "flag_values": "a b", "flag_meanings": "x"}
HOSTILE_ATTRIBUTES = {
    "long_name": "$\\frac",
    "units": "<b>\x00$",
    "flag_values": "0 1",
    "flag_meanings": "$;]",
}
OF_VARIABLES: dict[str, Callable[[xr.Variable], xr.Variable]] = {
    "words": filled("x"),
    "NaN": filled(np.nan),
    "Inf": filled(np.inf),
    "huge": filled(1e308),
    "tiny": filled(5e-324),
    "zero": filled(0.0),
    "negative": filled(-1.0),
    "complex": filled(1j),
    "true": filled(True),
    "whole": filled(1),
    "random": random,
    "swinging": swinging,
    "scalar": lambda v: xr.Variable((), 1.0),
    "elsewhere": lambda v: xr.Variable(("zz",), np.arange(3.0)),
    "wider": lambda v: xr.Variable((*v.dims, "zz"), np.zeros((*v.shape, 2))),
    "transposed": lambda v: v.transpose(),
    "of no size": lambda v: xr.Variable(("nil",), np.zeros(0)),
    "odd attributes": lambda v: xr.Variable(v.dims, v.values, ODD_ATTRIBUTES),
    "hostile attributes": lambda v: xr.Variable(v.dims, v.values, HOSTILE_ATTRIBUTES),
}
OF_DIMENSIONS: dict[str, Callable[[xr.Dataset, str], xr.Dataset]] = {
    "of size 0": lambda d, n: d.isel({n: []}),
    "of size 1": lambda d, n: d.isel({n: [0]}),
    "gone": lambda d, n: d.isel({n: 0}, drop=True),
    "one place": lambda d, n: d.isel({n: 0}),
    "twice": lambda d, n: d.isel({n: [0, 0, -1]}),
    "renamed": lambda d, n: d.rename({n: "else"}),
    "reversed": lambda d, n: d.isel({n: slice(None, None, -1)}),
}


def changed(ds: xr.Dataset, name: str, damage: Callable[[xr.Variable], xr.Variable]) -> xr.Dataset:
    new = damage(ds.variables[name])
    rest = ds.drop_vars(name)
    return rest.assign_coords({name: new}) if name in ds.coords else rest.assign({name: new})


def of_contents(
    ds: xr.Dataset, names: Collection[str] | None = None
) -> Iterator[tuple[str, Damage]]:
    """Every variable and coordinate (of `names`): absent, other values, dimensions, types; every
    dimension.
    """
    for name in map(str, ds.variables if names is None else names):
        if name in ds.variables:
            yield f"{name} absent", lambda d, n=name: d.drop_vars(n)
            for what, damage in OF_VARIABLES.items():
                if name not in ds.sizes or damage(ds.variables[name]).dims == (name,):
                    yield f"{name}: {what}", lambda d, n=name, f=damage: changed(d, n, f)
    for dim, (what, cut) in itertools.product(map(str, ds.sizes), OF_DIMENSIONS.items()):
        if names is None or dim in names:
            yield f"{dim} {what}", lambda d, n=dim, f=cut: f(d, n)


def some(
    cases: Iterator[tuple[str, Damage]], every: int, first: int = 0
) -> list[tuple[str, Damage]]:
    return list(itertools.islice(cases, first, None, every))


def through(
    ds: xr.Dataset, cases: list[tuple[str, Damage]], show: Callable[[xr.Dataset], object]
) -> int:
    """How many were refused in one line; fails with a list of all that ended in any other way."""
    wrong, refused = [], 0
    for what, damage in cases:
        odd = damage(ds)
        try:
            show(odd)
        except CurvlabError as error:
            refused += 1
            if "\n" in str(error) or "cannot be drawn" in str(error):
                wrong.append(f"{what}: {error}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong[:20])
    return refused


def words_of(ds: xr.Dataset) -> None:
    ready, odd = regular(ds)
    assert all("\n" not in what for what in odd)
    assert all(isinstance(value, str) for value in about.facts(ready).values())
    about.notes(ready)
    about.calls(ready)
    about.title(ready)


def tables_of(ds: xr.Dataset) -> None:
    found, _ = tables.at_the_end(ds)
    for table in (*tables.own(ds), *found):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)


def drawing(name: str) -> Callable[[xr.Dataset], object]:
    return lambda ds: picture(figures.draw(ds, name), "png", dpi=30)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", KINDS)
def test_any_attribute_may_be_odd(small: dict[str, xr.Dataset], kind: str) -> None:
    """What is said of a run in words: more than 300 damages of each log, and no exception at
    all.
    """
    names = (
        "train_loss",
        "val_loss",
        "steps",
        "wall_seconds",
        "cosine",
        "loss",
        "seconds",
        "density",
    )
    ds = small[kind][[name for name in names if name in small[kind]]]
    cases = list(of_attributes(ds))
    assert len(cases) > 300
    assert through(ds, cases, words_of) == 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", KINDS)
def test_any_variable_may_be_odd(small: dict[str, xr.Dataset], kind: str) -> None:
    """Words and tables of a part of the damages that the slow tests have all of: no exception
    either.
    """
    cases = list(of_contents(small[kind]))
    assert len(cases) > 150
    assert through(small[kind], some(iter(cases), 3), words_of) == 0
    assert through(small[kind], some(iter(cases), 17), tables_of) == 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_of_odd_logs(small: dict[str, xr.Dataset], name: str) -> None:
    """A part of the damages to what the figure reads; more of them when slow."""
    for kind in KINDS:
        if figures.FIGURES[name].needs in small[kind]:
            ds = small[kind].isel({d: [0] for d in ("block", "step") if d in small[kind].sizes})
            cases = some(of_contents(ds, READ[name]), 23, 3)
            assert through(ds, cases, drawing(name)) <= len(cases) // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_every_odd_log(logs: dict[str, xr.Dataset], kind: str) -> None:
    cases = [*of_attributes(logs[kind]), *of_contents(logs[kind])]
    assert len(cases) > 600
    assert through(logs[kind], cases, tables_of) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_of_every_odd_log(small: dict[str, xr.Dataset], name: str, kind: str) -> None:
    if figures.FIGURES[name].needs not in small[kind]:
        pytest.skip("no figure of this log")
    ds = small[kind].isel({d: [0] for d in ("block", "step") if kind == "spectrum"})
    cases = list(of_contents(ds, READ[name]))
    for key in ("reference", "algorithm", "model", "data", "error"):
        cases += [
            (what, damage) for what, damage in of_attributes(ds) if what.startswith(f"{key}: ")
        ]
    through(ds, cases, drawing(name))


def test_the_damages_are_seen(small: dict[str, xr.Dataset]) -> None:
    """The tests above could not fail if nothing were damaged."""
    said = [regular(damage(small["spectrum"]))[1] for _, damage in of_contents(small["spectrum"])]
    assert sum(map(bool, said)) > 100
    assert all(regular(ds)[1] == [] for ds in small.values())
    log = small["compare"]
    assert (
        "variable 'cosine' holds no numbers"
        in regular(changed(log, "cosine", OF_VARIABLES["words"]))[1]
    )
    assert "coordinate 'block' is absent" in regular(log.drop_vars("block"))[1]
    assert "variable 'steps' is absent" in regular(small["train"].drop_vars("steps"))[1]
    assert regular(log.assign_attrs(settings="{"))[1] == ["attribute 'settings' is no JSON object"]


def written(ds: xr.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(in_memory(ds))
    return path


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", KINDS)
def test_report_and_plot_leave_nothing_beside(
    small: dict[str, xr.Dataset], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through files and the command line: one file and exit 0, or none and one line; what is odd is
    said in one more.
    """
    name = figures.main_figure(small[kind])
    main = figures.FIGURES[name].needs
    damages = {
        "absent": lambda d: d.drop_vars(main),
        "words": lambda d: changed(d, main, OF_VARIABLES["words"]),
        "attributes": lambda d: d.assign_attrs(
            settings="{", call=3.0, error="", resumed=np.arange(3.0)
        ),
        "no version": lambda d: d.assign_attrs(versions="[]"),
    }
    for what in {"train": ["attributes"], "compare": list(damages), "spectrum": ["words"]}[kind]:
        damage = damages[what]
        log = written(damage(small[kind]), tmp_path / what / "run.h5")
        there = {"run.h5"}
        for command, output in (("report", "report.html"), ("plot", f"{name}.png")):
            options = ["--figure", name] if command == "plot" else []
            code = call(command, str(log.parent), *options)
            err = capsys.readouterr().err
            lines = err.splitlines()
            assert code == (
                2 if what == "no version" or (command == "plot" and what != "attributes") else 0
            ), err
            assert len([line for line in lines if "curvlab: warning: in the log" not in line]) == (
                code != 0
            ), err
            assert len(lines) <= 2
            assert all(str(log.parent) in line for line in lines)
            there |= {output} if code == 0 else set()
            assert {p.name for p in log.parent.iterdir()} == there


def test_a_report_of_damaged_and_whole_logs_says_what_is_left_out(
    small: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    train = (
        small["train"]
        .drop_vars(["wall_seconds", "pair_curvature_mean"])
        .assign_attrs(settings="{", budget=7)
    )
    given = [("a", train), ("b", small["train"]), ("c", small["spectrum"].drop_vars("lower"))]
    with progress_bar(Console(file=io.StringIO()), False) as bar:
        text = page(given, bar)
    parsed = Parsed(text)
    said = " ".join(parsed.text)
    for part in ("attribute 'settings' is no JSON object", "variable 'wall_seconds' is absent"):
        assert part in said
    for part in ("Not drawn: pairs of a training run", "Not drawn: eigenvalues of each layer's"):
        assert part in said
    numbers = [int(n) for n in re.findall(r'id="figure-(\d+)"', text)]
    assert numbers == list(range(1, len(numbers) + 1))
    # together; of a without its pairs, of b all, of c the loss
    assert len(numbers) == 1 + 2 + 3 + 1


# ---- text


ALPHABET = (
    "$[]<>&\"'\\%{}_^/\n\r\t\x00\x07\x1b\x7f\x85\u2028\u202e\ud800\udfff\ufffe\uffff\U0001f600שΩ漢"
    " ab1:"
)
TEXTS = st.text(
    st.one_of(st.sampled_from(ALPHABET), st.characters(codec=None, exclude_categories=())),
    max_size=40,
)
FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=200, deadline=None)


class Parsed(HTMLParser):
    """The text of a page and of its attributes, as a browser takes it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.tag = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        self.inside.setdefault(self.tag, []).append(data)


@MANY
@given(TEXTS)
@example("\x1b[31m$x$[/b]\udcff\u202e")
def test_text_of_a_terminal_is_one_line_that_moves_nothing(text: str) -> None:
    said = for_terminal(text)
    assert said == for_terminal(said)
    assert len(said.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", said)
    said.encode()
    assert for_rich(text).plain == said
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=1000, soft_wrap=True)
    console.print(for_rich(text))
    assert file.getvalue() == said + "\n"
    assert str(CurvlabError(text)) == said
    if text.isprintable():
        assert said == text or set(text) & set("\u200e\u200f")


@MANY
@given(TEXTS)
def test_text_of_xml_and_html_comes_back(text: str) -> None:
    element = ET.Element("a", {"b": for_xml(text)})
    element.text = for_xml(text)
    again = ET.fromstring(ET.tostring(element, encoding="unicode"))
    assert (again.text or "") == again.attrib["b"] == for_terminal(text)
    assert for_html(text).replace("\n", "\\n").replace("\t", "\\t") == for_terminal(text)


@MANY
@given(TEXTS)
@example("_a")
@example("$x$" * 100)
@example("\\$x\\$")
def test_text_of_matplotlib_has_no_mathtext_and_every_glyph(text: str) -> None:
    from matplotlib.cbook import is_math_text

    said = for_matplotlib(text)
    assert len(said) <= LONGEST + 1
    assert not is_math_text(said)
    assert not is_math_text(f"{said}, {for_matplotlib('b$')}")
    assert "\n" not in said
    assert not said.startswith("_")
    if len(text) < 12:
        shown = said.replace(r"\$", "$").removeprefix(" " if text.startswith("_") else "")
        assert shown.encode("ascii", "backslashreplace") == for_terminal(text).encode(
            "ascii", "backslashreplace"
        )


def test_mathtext_of_the_project_stays() -> None:
    figure = Figure()
    text: Any = figure.text(0.5, 0.5, f"$10^{{3}}$ of {for_matplotlib('a$b_{c}$')}")
    assert text._preprocess_math(text.get_text()) == (r"$10^{3}$ of a\$b_{c}\$", True)
    figure.canvas.draw()


def hostile(ds: xr.Dataset, name: str) -> xr.Dataset:
    """Every text that a log has is this one."""
    said = {
        key: value if key in ("versions", "seed") else name
        for key, value in ds.attrs.items()
        if isinstance(value, str)
    }
    labels: dict[Any, Any] = {
        dim: unique([f"{name}{i}" for i in range(size)])
        for dim, size in ds.sizes.items()
        if ds[dim].dtype.kind in "OU"
    }
    labels |= {"matrix": ds["matrix"].values} if "matrix" in labels else {}
    labels |= {"stage": ds["stage"].values} if "stage" in labels else {}
    found = ds.assign_attrs(said).assign_coords(
        {dim: np.asarray(words, dtype=object) for dim, words in labels.items()}
    )
    for values in found.variables.values():
        values.attrs = {"long_name": name, "units": name}
    return found


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_everywhere_in_a_log(logs: dict[str, xr.Dataset], kind: str) -> None:
    """Every figure as SVG parses, the page comes back as the text, the tables print."""
    name = "a$b_{c}$\\frac[/b][red]<i>&\"'%s\x1b[31m\x00\n\ud800\u202e😀漢:smile:"
    ds = hostile(logs[kind], name)
    with progress_bar(Console(file=io.StringIO()), False) as bar:
        text = page([(name, ds)], bar)
    text.encode()
    parsed = Parsed(text)
    assert "i" not in parsed.inside
    assert for_html(name) in parsed.inside["code"]  # the place
    assert for_html(name) in parsed.inside["title"]
    assert "\x1b" not in text
    assert "\x00" not in text
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == len(figures.applying(logs[kind]))
    assert all(for_xml(name) in ET.fromstring(one).attrib["aria-label"] for one in drawn)


@FEW
@given(name=TEXTS)
def test_any_name_is_drawn(small: dict[str, xr.Dataset], name: str) -> None:
    ds = hostile(small["compare"][["loss", "seconds"]], name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = svg.inline(figures.draw_all([(name, ds)], "seconds"), "f-", name)
    assert ET.fromstring(text).attrib["aria-label"] == for_terminal(name)


@MANY
@given(TEXTS)
def test_any_name_is_printed(name: str) -> None:
    held = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            terminal, "out", Console(file=held, force_terminal=True, width=2000, no_color=True)
        )
        terminal.show(tables.Table(name, (name, "x"), ((name, "1"), (name, "2"))), name)
        terminal.wrote(Path("a" + name.replace("\x00", "")))
    said = held.getvalue()
    assert for_terminal(name).strip() in said
    assert not re.search(r"\x1b(?!\[[0-9;]*m)|[\x00-\x09\x0b-\x1a\x7f-\x9f\u202e]", said)


@MANY
@given(TEXTS)
def test_any_name_is_a_task(name: str) -> None:
    held = io.StringIO()
    bar: Progress = progress_bar(Console(file=held, force_terminal=True, width=1000), True)
    bar.add_task(name, total=2, note=name)
    console = Console(file=held, width=1000)
    console.print(bar.get_renderable())
    shown = for_terminal(name).strip()
    # a modifier alone has no width: rich leaves it out
    assert held.getvalue().count(shown) >= 2 or not cell_len(shown)


def test_a_hostile_folder_does_not_keep_a_run_from_its_pictures(
    small: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    folder = tmp_path / "a$b_{c}$ [/b] \x1b[31m%s\\"
    folder.mkdir(parents=True)
    terminal.finish(small["train"].assign_attrs(model=str(folder)), folder, "training")
    assert {p.name for p in folder.iterdir()} == {"training.png", "training.svg"}
    ET.parse(folder / "training.svg")
    log = written(small["train"], folder / "run.h5")
    # two runs, told apart by their places
    assert call("plot", str(log), str(folder), "-o", str(tmp_path / "x.png")) == 0


# ---- what reaches outside of a file, and what is not as it was written


def by_hand(ds: xr.Dataset, path: Path, change: Callable[[h5py.File], object]) -> Path:
    written(ds, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def external_link(file: h5py.File) -> None:
    file["secret"] = h5py.ExternalLink("/etc/passwd", "/x")


def external_storage(file: h5py.File) -> None:
    (Path(file.filename).parent / "secret").write_bytes(b"0123456789" * 8)
    file.create_dataset(
        "secret", (10,), "f8", external=[(str(Path(file.filename).parent / "secret"), 0, 80)]
    )


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("secret", layout)


def soft_link(file: h5py.File) -> None:
    file["secret"] = h5py.SoftLink("/loss")


def in_a_group(file: h5py.File) -> None:
    group = file.create_group("a").create_group("b")
    group["back"] = file["a"]  # a circle
    group["secret"] = h5py.ExternalLink("other.h5", "/x")


def endless(file: h5py.File) -> None:
    file.create_dataset("secret", (10**15,), "f8", chunks=(10**6,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (external_link, "'/secret' in it is a link to another place"),
        (external_storage, "'/secret' in it keeps its values in other files"),
        (virtual, "'/secret' in it is put together from other data sets"),
        (soft_link, "'/secret' in it is a link to another place"),
        (in_a_group, "'/a/b/secret' in it is a link to another place"),
        (endless, "would need 8000000.0 GB"),
    ],
)
def test_what_reaches_outside_of_the_file_is_refused(
    small: dict[str, xr.Dataset],
    tmp_path: Path,
    change: Callable[[h5py.File], object],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = by_hand(small["spectrum"], tmp_path / "run.h5", change)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CurvlabError, match=re.escape(says)) as caught:
        cl.open(path)
    assert str(path) in str(caught.value)
    for command in ("plot", "report"):
        assert call(command, str(path)) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def sealed(path: Path, ds: xr.Dataset) -> Path:
    contents = in_memory(ds)
    rewrite_sealed(path, lambda stream: stream.write(contents))
    return path


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (
            SCHEMA + 1,
            (
                f"is of schema {SCHEMA + 1}, which a later curvlab wrote; this one reads up to"
                f" {SCHEMA}"
            ),
        ),
        ("one", "has a schema that is no positive number"),
        (0, "has a schema that is no positive number"),
        (1.5, "has a schema that is no positive number"),
        (np.arange(2), "has a schema that is no positive number"),
    ],
)
def test_a_schema_that_is_not_known(
    small: dict[str, xr.Dataset], tmp_path: Path, schema: object, says: str
) -> None:
    path = sealed(tmp_path / "run.h5", small["compare"].assign_attrs(schema=schema))
    with pytest.raises(CurvlabError, match=re.escape(says)):
        cl.open(path)


def test_a_log_without_its_seal_is_refused_and_one_of_an_earlier_version_is_not(
    small: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    ds = small["compare"]
    path = sealed(tmp_path / "run.h5", ds.assign_attrs(schema=SCHEMA))
    xr.testing.assert_identical(cl.open(tmp_path), ds)  # the schema stays with the file
    contents = path.read_bytes()
    path.write_bytes(contents[: contents.rindex(b"curvlab-sha256") - 1])
    with pytest.raises(CurvlabError, match="is not as curvlab wrote it, its checksum is absent"):
        cl.open(tmp_path)
    for place in range(40, len(contents), len(contents) // 40):
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 4]) + contents[place + 1 :])
        with pytest.raises(CurvlabError, match=r"is damaged|is not as curvlab wrote it"):
            cl.open(tmp_path)
    written(ds, path)
    xr.testing.assert_identical(cl.open(tmp_path), ds)


def test_a_log_that_is_changed_and_written_elsewhere_opens(tmp_path: Path) -> None:
    log = Log({"algorithm": ["a"]}, {}, {}, tmp_path / "run.h5")
    log.append(0, {"loss": ((), np.asarray(1.0))}, save=True)
    with xr.open_dataset(tmp_path / "run.h5", engine="h5netcdf") as ds:
        assert ds.attrs["schema"] == SCHEMA
    cl.open(tmp_path).assign_attrs(title="mine").to_netcdf(tmp_path / "mine.h5", engine="h5netcdf")
    assert cl.open(tmp_path / "mine.h5").attrs["title"] == "mine"


@pytest.mark.parametrize("path", ["x" * 300, "\x00", "\udcff" * 3, "a\nb", "\x1b[31m"])
def test_a_path_of_no_file_is_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(CurvlabError, match=r"no log at|cannot be") as caught:
        cl.open(str(tmp_path / path))
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [1, pytest.param(3000, marks=pytest.mark.slow)])
def test_very_few_and_very_many(small: dict[str, xr.Dataset], kind: str, many: int) -> None:
    """One step of everything; thousands of algorithms, layers and steps."""
    ds = small[kind].isel(
        {str(d): [0] for d in small[kind].sizes if d not in ("bin", "index", "stage", "pair")}
    )
    if many > 1:
        dim = {"train": "epoch", "compare": "algorithm", "spectrum": "block"}[kind]
        rows = np.zeros(many, int)
        labels = (
            np.arange(many)
            if dim == "epoch"
            else np.asarray([f"n{i}" for i in range(many)], dtype=object)
        )
        ds = ds.isel({dim: rows}).assign_coords({dim: labels})
    words_of(ds)
    tables_of(ds)
    if many == 1 or kind == "compare":
        for name in figures.applying(ds):
            drawing(name)(ds)


def test_no_control_character_reaches_the_terminal(
    small: dict[str, xr.Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(small["compare"].assign_attrs(settings="{"), tmp_path / "a\x1b[31m$" / "run.h5")
    assert call("plot", str(log), "--figure", "loss", "-o", str(tmp_path / "\x1b[5mx.png")) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[5mx.png" in said.out
    assert said.err.count("\n") == 1
    assert "attribute 'settings' is no JSON object" in said.err
    assert call("plot", str(log), "--figure", "\x1b[5m") == 2
    assert call("plot", str(tmp_path / "\x1b[5m\n")) == 2
    assert "\x1b" not in capsys.readouterr().err
