"""Options that a function takes as keywords because a dataclass has them.

They are checked, and shown by `help`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from curvlab.errors import unknown

F = TypeVar("F", bound=Callable[..., Any])


def known_options(
    options: Mapping[str, Any], settings: type, function: Callable[..., Any]
) -> dict[str, Any]:
    """Return the options, all of which are fields of `settings`, a dataclass.

    Args:
        options: a user's.
        settings: the dataclass.
        function: that has the options, beside parameters of its own.

    Raises:
        CurvlabError: an option that it does not have, with the names that it has.
    """
    names = [field.name for field in dataclasses.fields(settings)]
    for name in options:
        if name not in names:
            named = [
                other.name
                for other in inspect.signature(function).parameters.values()
                if other.kind is inspect.Parameter.KEYWORD_ONLY
            ]
            raise unknown(f"option of {function.__name__}", name, named)
    return dict(options)


def shows(*settings: type) -> Callable[[F], F]:
    """Return a decorator that shows dataclasses' fields in the signature of a function.

    They stand in the place of its ``**options``.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        parameters = dict(own.parameters)
        rest = parameters.popitem()[1]  # **options stands last
        for kind in settings:
            for field in dataclasses.fields(kind):
                if field.name not in parameters:
                    default: Any = field.default
                    if field.default_factory is not dataclasses.MISSING:
                        default = field.default_factory()
                    parameters[field.name] = inspect.Parameter(
                        field.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=(
                            inspect.Parameter.empty if default is dataclasses.MISSING else default
                        ),
                        annotation=field.type,
                    )
        every = [*parameters.values(), rest]
        function.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]  # what inspect looks for
        return function

    return decorate
