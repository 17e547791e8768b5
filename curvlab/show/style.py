"""How an algorithm looks: one colour, dash pattern and marker in every figure of the package.

The reproductions are among them.

A family of methods has a hue, of Okabe and Ito's palette as far as that goes, which colour-blind
readers tell apart; its members differ in lightness. For print a family has a marker, and its
members differ in dashes. No two lines of one figure share a colour (`looks`).
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgb

FAMILIES: dict[str, tuple[str, ...]] = {
    "#0072B2": ("kfac", "kfac-20", "kfac-ef", "kflr", "kfac-reduce", "ekfac", "foof"),
    "#D55E00": ("tnt", "tnt-ef", "tnt-per-sample", "tnt-ideal"),
    "#009E73": ("shampoo", "asgo", "muon", "soap", "kl-shampoo"),
    "#CC79A7": ("adam", "rmsprop", "adamw", "sophia-g"),
    "#E69F00": ("sgd-m",),
    "#7F3C8D": (
        "k-bfgs",
        "k-bfgs-l",
        "k-bfgs-convergent",
        "k-bfgs-20",
        "k-bfgs-l-20",
        "k-bfgs-20-convergent",
        "kf-bfgs-cnn",
        "kf-bfgs-l-cnn",
        "kf-bfgs-cnn-convergent",
    ),
    "#56B4E9": ("skqn-l", "skqn-b1", "skqn-b2"),
    "#8C6D31": ("s4qn", "ssn", "lbfgs"),
    "#AA0000": ("smw-ng", "smw-gn", "smw-ng-bd", "smw-ng-bd-ef"),
    "#117733": ("hf", "full-ggn"),
    "#000000": ("block-fisher", "block-ef", "block-ggn", "block-hessian"),
}
"""{hue: its algorithms, the one that has the hue itself first}"""

OTHERS = "#666666"
"""The hue of algorithms that are in no family: a user's own."""

DASHES = (
    (0, ()),
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (1, 1)),
    (0, (9, 1.5)),
    (0, (3, 3)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (12, 2, 2, 2)),
)
"""Dashes of the members of a family in turn, each family from another one on."""

MARKERS = "os^vDPX*<>hp"
"""Markers of the families, in their order; the last is that of all other algorithms."""

MATRICES = {
    "ggn": ("GGN", "#56B4E9"),
    "hessian": ("Hessian", "#D55E00"),
    "fisher": ("Fisher", "#009E73"),
    "fisher-mc": ("Monte-Carlo Fisher", "#CC79A7"),
    "ef": ("empirical Fisher", "#E69F00"),
    "pi": ("Π", "#000000"),
}
"""{matrix: (how a legend calls it, colour)}, in the order of drawing."""


@dataclass(frozen=True)
class LineStyle:
    """The way a line is drawn: its colour, dashes and marker."""

    colour: str
    dashes: tuple[int, tuple[float, ...]]
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Colour and dashes of the line, as `Axes.plot` takes them."""
        return {"color": self.colour, "linestyle": self.dashes}


def look(algorithm: str) -> LineStyle:
    """Return the look of an algorithm: a function of its name alone."""
    return next(_variations(algorithm))


def looks(algorithms: Mapping[str, str]) -> dict[str, LineStyle]:
    """Return {label: look} of the lines of one figure, given as {label: algorithm}.

    Every algorithm has its own look. Of several lines of one algorithm the first has it, the others
    take shades of its family that are free.
    """
    names = set(algorithms.values())
    own = {name: look(name).colour for name in sorted(names)}
    taken: set[str] = set()
    found = {}
    for label, algorithm in algorithms.items():
        reserved = {colour for name, colour in own.items() if name != algorithm}
        free = (v for v in _variations(algorithm) if v.colour not in taken | reserved)
        found[label] = next(free, None) or look(algorithm)
        taken.add(found[label].colour)
    return found


def colours(count: int) -> list[str]:
    """Return colours of lines that are no algorithms: blocks, say.

    They repeat after the eleven hues.
    """
    return list(itertools.islice(itertools.cycle(FAMILIES), count))


def shading(most: bool = False) -> Colormap:
    """Return the colours of a quantity, dark where it is best.

    They are lightnesses of the first hue, so that they are told apart in print and by everyone.

    Args:
        most: whether it is best where it is large.
    """
    hue = next(iter(FAMILIES))
    shades = ["#04283F", hue, "#7FBDE3", "#F2F8FC"]
    return LinearSegmentedColormap.from_list("curvlab", shades[::-1] if most else shades)


def _variations(algorithm: str) -> Iterator[LineStyle]:
    """Yield an algorithm's own look, then further shades of its family."""
    place, hue, members = next(
        ((i, h, m) for i, (h, m) in enumerate(FAMILIES.items()) if algorithm in m), (-1, OTHERS, ())
    )
    first = members.index(algorithm) if members else crc32(algorithm.encode()) % 24
    for step in itertools.chain([first], range(first + 1, first + 1 + _SHADES)):
        yield LineStyle(_shade(hue, step), DASHES[(place + step) % len(DASHES)], MARKERS[place])


_SHADES = 60
_GOLDEN = 0.6180339887498949
_DARK, _LIGHT = 18.0, 78.0  # L* of shades: what is lighter is lost on white


def _shade(hue: str, step: int) -> str:
    """Return the hue itself at step 0; then lightnesses between dark and light.

    Each is far from the ones before it, as the eye sees them (CIE L*), the hue's own among them.
    """
    if step == 0:
        return hue
    h, own, saturation = colorsys.rgb_to_hls(*to_rgb(hue))
    place = (_lightness(to_rgb(hue)) - _DARK) / (_LIGHT - _DARK)
    wanted = _DARK + (_LIGHT - _DARK) * ((place + step * _GOLDEN) % 1.0)
    low, high = 0.0, 1.0
    for _ in range(20):  # L* grows with that of HLS
        own = (low + high) / 2
        darker = _lightness(colorsys.hls_to_rgb(h, own, saturation)) < wanted
        low, high = (own, high) if darker else (low, own)
    return str(to_hex(colorsys.hls_to_rgb(h, own, saturation))).upper()


def _lightness(rgb: tuple[float, float, float]) -> float:
    """Return CIE L* of a colour of sRGB, 0 to 100."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance
