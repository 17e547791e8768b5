"""NAME=VALUE words of a command line, read as the values that they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvlab.errors import CurvlabError, shown


def assigned(words: list[str] | None, option: str) -> dict[str, Any]:
    """Return NAME=VALUE as {name: value}.

    A value is a number, true, false or none where it reads as one, or several numbers with commas
    between.
    """
    found = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise CurvlabError(f"{option} takes NAME=VALUE, not {shown(word)}")
        found[name.strip().replace("-", "_")] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if "," in text:
        several = [_value(part.strip()) for part in text.split(",") if part.strip()]
        return text if any(isinstance(part, str | None) for part in several) else several
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def training_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what options of `curvlab train` say that are words on the command line.

    Args:
        given: {option: value}, all of them.

    Raises:
        CurvlabError: a word that is no NAME=VALUE, an unknown probe.
    """
    from curvlab.probes import asked

    return {
        "own": assigned(given["own"], "--set"),
        "schedule_options": assigned(given["schedule_own"], "--schedule-set"),
        "warm": given["warm_start"],
        "probes": asked(given["probe"] or [], "train"),
    }
