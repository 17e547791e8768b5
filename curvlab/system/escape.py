r"""Text from outside, made fit for where it is shown.

There is one function for each of terminal, rich, XML, HTML and matplotlib.

Names of folders, models, data sets and algorithms, and whatever a log holds, may be any string.
What a place cannot show stands as Python would write it, ``\x1b``, ``\n``, ``\udcff``, so that two
names that differ still do. (rich and matplotlib are imported where they are asked for: errors need
neither.)
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LONGEST = 120
"""Letters of one text in a figure at most."""

_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters, halves of surrogate pairs, separators of lines."""
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They reorder what stands beside them: a name that holds one could pass for another."""


def for_terminal(text: object, *, lines: bool = False) -> str:
    """Return one line that moves no cursor and rings no bell; `lines` keeps line ends and tabs."""
    return "".join(char if lines and char in "\n\t" else _shown(char) for char in str(text))


def for_rich(text: object, *, lines: bool = False) -> Text:
    """Return the text as `for_terminal` gives it, for a rich console.

    Nothing in it is markup, an emoji's name or a number to be coloured.
    """
    from rich.text import Text

    return Text(for_terminal(text, lines=lines))


def for_xml(text: object) -> str:
    """Return what an XML document can hold, on one line.

    Its writer escapes ``&``, ``<`` and quotes.
    """
    return for_terminal(text)


def for_html(text: object) -> str:
    """Return what a page can hold, with its line ends and tabs.

    The template escapes ``&``, ``<`` and quotes.
    """
    return for_terminal(text, lines=True)


def for_matplotlib(text: object, longest: int = LONGEST) -> str:
    """Return one line of letters that the font has, both ends of what is too long.

    It holds no mathtext, and nothing that a legend leaves out. Of all functions here it is the one
    whose result must not be given to it again: matplotlib takes its escapes away.
    """
    from matplotlib import rcParams

    families = tuple(rcParams["font.family"])
    line = _both_ends([_drawn(char, families) for char in str(text)], longest)
    # of legends matplotlib leaves out what begins so
    return f" {line}" if line.startswith("_") else line


def _both_ends(letters: list[str], longest: int) -> str:
    """Return the letters as one text, its middle left out where it is longer than `longest`."""
    if sum(map(len, letters)) <= longest:
        return "".join(letters)
    half = (longest - 1) // 2
    first = sum(length <= half for length in accumulate(map(len, letters)))
    last = sum(length <= half for length in accumulate(map(len, reversed(letters))))
    return "".join([*letters[:first], "…", *letters[len(letters) - last :]])


def _shown(char: str) -> str:
    if char.isascii():
        return char if char.isprintable() else repr(char)[1:-1]
    return (
        _code(char)
        if unicodedata.category(char) in _UNSEEN or char in _TURNING or _is_none(char)
        else char
    )


def _is_none(char: str) -> bool:
    """Return whether Unicode keeps the place free for good: XML and HTML take no such letter."""
    return ord(char) & 0xFFFE == 0xFFFE or "\ufdd0" <= char <= "\ufdef"


def _code(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode()


@lru_cache(4096)
def _drawn(char: str, families: tuple[str, ...]) -> str:
    if char == "$":
        return r"\$"
    shown = _shown(char)
    return shown if len(shown) > 1 or _has(char, families) else _code(char)


def _has(char: str, families: tuple[str, ...]) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return any(
        get_font(findfont(FontProperties(family=[family]))).get_char_index(ord(char))
        for family in families
    )
