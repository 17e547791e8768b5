"""Axes of a grid: the values of an option, and what each is called in words and in folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from curvlab.errors import CurvlabError, shown

Value = int | float | bool | str
"""A value of an option, as the command line reads it."""


@dataclass(frozen=True)
class GridAxis:
    """The values that a grid gives one option.

    Args:
        name: of the option, as `lr`; of an algorithm's own option, its name there.
        values: at least one, each once.
        own: whether it is an algorithm's own, said by ``--set``.
    """

    name: str
    values: tuple[Value, ...]
    own: bool = False

    def check(self) -> None:
        """Check the values.

        Raises:
            CurvlabError: there is none, one is there twice, or two have the same folder.
        """
        if not self.values or any(value == "" for value in self.values):
            raise CurvlabError(
                f"the grid of {self.name} is empty or has an empty value: give"
                f" {self.name}=VALUE,VALUE,…"
            )
        kinds = {isinstance(value, bool | str) for value in self.values}
        if len(kinds) > 1 or (True in kinds and len({type(v) for v in self.values}) > 1):
            raise CurvlabError(
                f"the values of {self.name} are of several kinds ({self.said}): give numbers, or"
                " words"
            )
        known: dict[str, Value] = {}
        for value in self.values:
            folder = in_folder(value)
            if value in known.values():
                raise CurvlabError(f"the grid of {self.name} has the value {shown(value)} twice")
            if folder in known:
                raise CurvlabError(
                    f"{self.name} {typed(known[folder])} and {typed(value)} would share the folder"
                    f" '{self.name}-{folder}': give values that differ in their first six digits"
                )
            known[folder] = value

    @property
    def said(self) -> str:
        """The values with commas between, as they are typed."""
        return ",".join(map(typed, self.values))

    def words(self, value: Value) -> list[str]:
        """Return what a command line says for one of the values."""
        if self.own:
            return ["--set", f"{self.name}={typed(value)}"]
        option = self.name.replace("_", "-")
        if isinstance(value, bool):
            return [f"--{option}" if value else f"--no-{option}"]
        return [f"--{option}", typed(value)]


def typed(value: Value) -> str:
    """Return a value as it is typed: the same number when it is read again."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_folder(value: Value) -> str:
    """Return a value as it stands in the name of a folder: a number by six digits."""
    if isinstance(value, float):
        return f"{value:g}"
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in typed(value))


def merged(axes: Sequence[GridAxis], instead: Sequence[GridAxis]) -> tuple[GridAxis, ...]:
    """Return the axes, those of `instead` in the place of their namesakes, and behind them."""
    chosen = {axis.name: axis for axis in axes} | {axis.name: axis for axis in instead}
    return tuple(chosen.values())
