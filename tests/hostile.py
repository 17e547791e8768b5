"""Bad command lines, made of the options' own types: every option of every command with what it
cannot be, and places of every bad kind.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from curvlab.algorithms import ALGORITHMS
from curvlab.cli import app as cli
from curvlab.training import schedules

LONG = "9" * 400
HUGE = (
    "18446744073709551616",
    "9223372036854775808",
    "-9223372036854775809",
    LONG,
    f"-{LONG}",
    "9" * 5000,
)
ODD = (
    "\x00",
    "a\x00b",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "\ud83d",
    "$\\frac{$",
    "[/b]",
    "🦆",
    "\u202eabc",
    "a\u2028b",
    "a" * 300,
)
"""Texts that are no name of anything."""
NO_WHOLE = (*HUGE, "", " ", "abc", "1.5", "0x10", "nan", "inf", "1e400", "½", "--", "1,2", *ODD)
NO_REAL = (
    "",
    " ",
    "abc",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "-1",
    "1,5",
    "0x1p3",
    LONG,
    "9" * 5000,
    "½",
    *ODD,
)
PERHAPS = (
    "0",
    "-1",
    "1",
    " 3",
    "1_0",
    "१",
    "+5",
    "1e-400",
    "-0",
    "1000000000000",
    "999999999999999",
)
"""Numbers that some options take and others do not."""
OWN = ("here:broken", "here:exits", "unparsable:f", "failing:f", "exiting:f")
"""A user's code that fails: its own frames stand before the line."""
MODULES = (
    *OWN,
    ":",
    "a:",
    ":b",
    "nosuch:f",
    "os:",
    "os:nosuch",
    "os:getcwd",
    "json:dumps",
    "math:pi",
    "curvlab:",
    "a.b.c:d",
    "..:x",
    "os.path:join",
    "a:b:c",
    "'os':x",
    "os\x00:x",
    "\udcff:x",
    "bad name:x",
    "sys:exit",
    "torch.nn:Identity",
    "torch:zeros",
    "here:nothing",
    "here:three",
    "here:untrainable",
)
DEVICES = (
    "cuda:99999999999999999999",
    "cuda:-1",
    "meta",
    "cuda:1:2",
    "tpu",
    "cuda:",
    ":0",
    "cuda:x",
)
PROBES = (
    "loss:0",
    "loss:-1",
    ":",
    "loss:",
    ":3",
    "loss:1.5",
    "loss:1:2",
    "los",
    "gram:9:9",
    *(f"loss:{n}" for n in HUGE[:4]),
)
PAIRS = ("", "=", "x", "=1", "x=1", "x==", " = ", "\x00=1", "\udcff=\udcff")
AFTER = (
    "0,18446744073709551616",
    "9" * 5000,
    "-1",
    "0,,x",
    "1.5",
    "nan",
    "1e3",
    "0;1",
    "9223372036854775808",
)

OF_OPTION = {
    "--model": MODULES,
    "--device": DEVICES,
    "--probe": PROBES,
    "--set": PAIRS,
    "--schedule-set": PAIRS,
    "--after": AFTER,
}

GOOD: dict[str, dict[str, str]] = {
    "StepLR": {"step_size": "2"},
    "MultiStepLR": {"milestones": "1,2"},
    "ExponentialLR": {"gamma": "0.9"},
    "CosineAnnealingLR": {"T_max": "3"},
    "CyclicLR": {"base_lr": "0.01", "max_lr": "0.1"},
    "CosineAnnealingWarmRestarts": {"T_0": "3"},
    "OneCycleLR": {"max_lr": "0.1", "total_steps": "30"},
}
"""What these schedules cannot be made without."""

MODEL = ("--model", "mlp-256-20")


@dataclass(frozen=True)
class Line:
    """One command line; `refused`: it is bad for certain."""

    words: tuple[str, ...]
    refused: bool = True
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join(
            word if len(word) < 60 else f"{word[:20]}…({len(word)})"
            for word in map(ascii, self.words)
        )


@dataclass
class Places:
    """A folder of odd places. `bad_out`: no run can go there; `bad_file`: nor a picture; `bad_run`:
    no log is there.
    """

    root: Path
    run: Path
    """A training run."""
    bad_out: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{command: folders}"""
    bad_file: tuple[str, ...] = ()
    bad_run: tuple[str, ...] = ()
    perhaps: tuple[str, ...] = ()

    def make(self) -> Places:
        root = self.root
        root.mkdir()
        (root / "file").write_text("no folder")
        (root / "empty").mkdir()
        (root / "dangling").symlink_to(root / "nowhere" / "at all")
        (root / "loop").symlink_to(root / "loop")
        os.mkfifo(root / "pipe.svg")
        (root / "folder.svg").mkdir()
        (root / "dangling.svg").symlink_to(root / "nowhere" / "at all.svg")
        (root / "loop.svg").symlink_to(root / "loop.svg")
        (root / "folder-for-log" / "run.h5").mkdir(parents=True)
        (root / "empty-log").mkdir()
        (root / "empty-log" / "run.h5").touch()
        taken = {"compare": "cosine.svg", "spectrum": "spectrum.png", "train": "training.png"}
        for command, name in taken.items():
            (root / f"taken-{command}" / name).mkdir(parents=True)
        (root / "taken-checkpoint" / "checkpoint.pt").mkdir(parents=True)
        texts = (
            "a\x00b",
            "\ud83d",
            "a" * 256,
            "é" * 128,
            f"{root}/{'b' * 300}/c",
            "/".join("d" * 1000),
            "e/" * 2200,
        )
        nowhere = [
            str(root / name)
            for name in ("file", "file/sub", "dangling", "dangling/sub", "loop", "loop/sub")
        ]
        devices = ("/dev/null", "/dev/null/x", "/proc/nothing", "/proc/nothing/x")
        never = (*texts, *nowhere, *devices, str(root / "folder-for-log"), str(self.run))
        self.bad_out = {command: (*never, str(root / f"taken-{command}")) for command in taken}
        self.bad_out["train"] += (str(root / "taken-checkpoint"),)
        self.bad_out["reproduce"] = (*texts, *nowhere, *devices)
        named = (
            "folder.svg",
            "pipe.svg",
            "dangling.svg",
            "loop.svg",
            "missing/x.svg",
            "file/x.svg",
            "loop/x.svg",
            "empty",
        )
        suffixes = (
            "x",
            "x.",
            "x.xyz",
            "x.pgf",
            "x.h5",
            "x.s\x00vg",
            "x.\udcff",
            f"{'a' * 252}.svg",
        )
        self.bad_file = (*texts, *(str(root / name) for name in (*named, *suffixes)), "/dev/null")
        self.bad_run = (
            *texts,
            *nowhere,
            *devices,
            "/dev/zero",
            *(
                str(root / name)
                for name in (
                    "empty",
                    "folder-for-log",
                    "empty-log",
                    "absent",
                    "pipe.svg",
                    "empty-log/run.h5",
                )
            ),
        )
        self.perhaps = (
            "~nosuch/x",
            "new",
            "new/er",
            "with space",
            "[/b]",
            "$",
            "\x1b[2J",
            "\udcff",
            "a\nb",
            ".",
        )
        return self


@dataclass(frozen=True)
class Parameter:
    """Of a command: its names, and the type that its value is read as (bool: a flag)."""

    names: tuple[str, ...]
    kind: type
    argument: bool


def parameters(command: str) -> list[Parameter]:
    """All but --help."""
    function = next(
        c.callback
        for c in cli.app.registered_commands
        if command in (c.name, getattr(c.callback, "__name__", ""))
    )
    group: Any = typer.main.get_command(cli.app)
    hints, known = get_type_hints(function), group.commands[command].params
    return [
        Parameter(tuple(p.opts), _plain(hints[p.name]), p.param_type_name == "argument")
        for p in known
        if p.name in hints
    ]


def _plain(hint: Any) -> type:
    """The type within a list, or beside None."""
    while get_args(hint):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def lines(places: Places) -> Iterator[Line]:
    """All lines that differ from a good one in one thing."""
    run = str(places.run)
    bases: dict[str, tuple[str, ...]] = {
        "compare": ("compare", *MODEL),
        "spectrum": ("spectrum", *MODEL, "--samples", "20", "--after", "0"),
        "train": ("train", *MODEL),
        "reproduce": ("reproduce", "figure-2.2", "--budget", "smoke"),
        "plot": ("plot", run),
        "report": ("report", run),
        "list": ("list", "models"),
    }
    yield from (
        Line(words)
        for words in (
            ("nosuch",),
            ("trian", *MODEL),
            ("--nosuch",),
            ("-z",),
            ("\udcff",),
            ("a\nb",),
        )
    )
    for command, base in bases.items():
        yield from _of_command(command, base, places)
    yield from _of_algorithms(bases["train"])
    yield from _of_schedules(bases["train"])
    yield from _resumed(places)
    yield from _of_environment()


def mixed(places: Places, count: int, seed: int = 0) -> Iterator[Line]:
    """Lines that differ from a good one in two or three things."""
    draw, single = (
        random.Random(seed),
        [line for line in lines(places) if line.words[:1] in (("compare",), ("train",))],
    )
    for _ in range(count):
        first = draw.choice(single)
        others = [draw.choice(single) for _ in range(draw.randint(1, 2))]
        words = first.words + tuple(
            w for other in others if other.words[:3] == first.words[:3] for w in other.words[3:]
        )
        yield Line(words, False, first.environment)


def _of_command(command: str, base: tuple[str, ...], places: Places) -> Iterator[Line]:
    for parameter in parameters(command):
        if parameter.argument:
            yield from _of_argument(command, base, places)
            continue
        option = next(name for name in parameter.names if name.startswith("--"))
        if parameter.kind is bool:
            yield Line((*base, f"{option}=maybe"))
            continue
        yield Line((*base, option))
        for value in _values(command, option, parameter.kind, places):
            yield Line((*base, option, value))
        for value in _doubtful(parameter.kind, places):
            yield Line((*base, option, value), False)
        if parameter.kind in (int, float):
            yield Line((*base, option, "1", option, "abc"))
            yield Line((*base, f"{option}=abc"))
    yield Line((*base, "--nosuch"))
    yield Line((*base, "--nosuch", "3"))
    yield Line((*base, "-z"))
    if command in ("compare", "spectrum", "train", "list", "reproduce"):
        yield Line((*base, "stray"))


def _values(command: str, option: str, kind: type, places: Places) -> Sequence[str]:
    """What an option does not take."""
    if kind is int:
        return NO_WHOLE
    if kind is float:
        return NO_REAL
    if option == "--output":
        return places.bad_file
    if kind is Path:
        return places.bad_out[command]
    return (*OF_OPTION.get(option, ()), *ODD, "nosuch")


def _doubtful(kind: type, places: Places) -> Sequence[str]:
    """What it may take or not."""
    if kind in (int, float):
        return PERHAPS
    return places.perhaps if kind is Path else ("", " ", ",")


def _of_argument(command: str, base: tuple[str, ...], places: Places) -> Iterator[Line]:
    first, rest = base[0], base[2:]
    if command in ("plot", "report"):
        yield Line((first,))
        yield from (Line((first, place, *rest)) for place in places.bad_run)
        yield from (Line((*base, place)) for place in places.bad_run[:3])
    else:
        yield from (Line((first, word, *rest)) for word in (*ODD, "nosuch"))


def _of_algorithms(base: tuple[str, ...]) -> Iterator[Line]:
    for name, algorithm in ALGORITHMS.items():
        for option in algorithm.options:
            words = (*base, "--algorithm", name, "--set")
            yield from (Line((*words, f"{option}={value}")) for value in (LONG, HUGE[0]))
            yield from (
                Line((*words, f"{option}={value}"), False)
                for value in ("abc", "nan", "1e400", "-1", "0", "", "1,2")
            )


def _of_schedules(base: tuple[str, ...]) -> Iterator[Line]:
    known = [name for name in schedules.known() if name != "constant"]
    for name in known:
        given = GOOD.get(name, {})
        for option in schedules.find_schedule(name).options:
            others = tuple(
                w for o, v in given.items() if o != option for w in ("--schedule-set", f"{o}={v}")
            )
            words = (*base, "--schedule", name, *others, "--schedule-set")
            yield from (Line((*words, f"{option}={value}")) for value in (LONG, "[]"))
            yield from (
                Line((*words, f"{option}={v}"), False)
                for v in ("abc", "nan", "-1", "0", "", "1,2", "true", HUGE[0])
            )
        for option in given:
            words = tuple(
                w for o, v in given.items() if o != option for w in ("--schedule-set", f"{o}={v}")
            )
            yield Line((*base, "--schedule", name, *words))
    one = (
        "--schedule",
        "OneCycleLR",
        "--schedule-set",
        "max_lr=0.1",
        "--schedule-set",
        "total_steps=2",
    )
    yield Line((*base, *one, "--epochs", "3"))
    yield Line((*base, *one, "--steps", "3", "--schedule-every", "step"))
    yield Line((*base, *one, "--epochs", "2"), False)
    yield Line((*base, "--schedule", "ReduceLROnPlateau", "--schedule-every", "step"))


def _resumed(places: Places) -> Iterator[Line]:
    resume = ("train", "--resume")
    yield Line(resume)
    for place in (*places.bad_out["train"], "absent", str(places.root / "empty")):
        if place != str(places.run):
            yield Line((*resume, "--out", place))
    here = (*resume, "--out", str(places.run))
    yield Line(here, False)
    for words in (
        ("--seed", "4"),
        ("--lr", "nan"),
        ("--steps", HUGE[0]),
        ("--model", "nosuch"),
        ("--epochs", "0"),
    ):
        yield Line((*here, *words))


def _of_environment() -> Iterator[Line]:
    for value in ("~nosuch", "~nosuch/data", "a" * 300, "b/" * 2200):
        for name, model in (("CURVLAB_DATA", "logistic"), ("CURVLAB_CACHE", "curves-ae")):
            yield Line(("train", "--model", model, "--batch-size", "10"), True, ((name, value),))
