"""Where derivatives are taken, whatever surrounds the call: modes of autograd, autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlab.control_flow import CONTROL_FLOW

_around: ContextVar[tuple[str, torch.dtype] | None] = ContextVar(
    "autocast around the call", default=None
)


def _autocast() -> tuple[str, torch.dtype] | None:
    if not torch._C._is_any_autocast_enabled():
        return None
    return next(
        (
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ),
        None,
    )


def around() -> tuple[str, torch.dtype] | None:
    """Return the autocast that the user has put around the call, None where there is none.

    It is (type of device, dtype).
    """
    return _around.get() or _autocast()


class precise(ContextDecorator):
    """Arithmetic in the tensors' own precision inside, also under autocast.

    Nor is it `torch.inference_mode()`, whose tensors no later step could write to. `surrounding` is
    the autocast that was around.
    """

    # Classes, not generators: several are opened at every look, where nothing mostly is to be done.
    __slots__ = ("_around", "_off", "_out")

    def _recreate_cm(self) -> precise:  # of a decorator, at every call
        return type(self)()

    def __enter__(self) -> None:
        found = _autocast()
        self._out: torch.inference_mode | None = None
        if torch.is_inference_mode_enabled():
            self._out = torch.inference_mode(False)
            self._out.__enter__()
        self._off: torch.autocast | None = None
        if found is not None:
            self._around = _around.set(found)
            self._off = torch.autocast(found[0], enabled=False)
            self._off.__enter__()  # type: ignore[no-untyped-call]  # torch has no types there

    def __exit__(self, *error: Any) -> None:
        if self._off is not None:
            self._off.__exit__(*error)
            _around.reset(self._around)
        if self._out is not None:
            self._out.__exit__(*error)


def surrounding() -> AbstractContextManager[Any]:
    """Return what the user has put around the call, for the forward pass.

    It is autocast, inside of `precise` too.
    """
    found = _around.get()
    return nullcontext() if found is None else torch.autocast(*found)


class derivatives(ContextDecorator):
    """A context in which gradients are recorded, and nothing of ours is autocast; a decorator too.

    They are also under `torch.no_grad()` and `torch.inference_mode()`.
    """

    __slots__ = ("_opened",)

    def _recreate_cm(self) -> derivatives:
        return type(self)()

    def __enter__(self) -> None:
        self._opened: ExitStack | None = None
        if (
            not torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or _autocast() is not None
        ):
            self._opened = ExitStack()
            for opened in (torch.inference_mode(False), torch.enable_grad(), precise()):
                self._opened.enter_context(opened)

    def __exit__(self, *error: Any) -> None:
        if self._opened is not None:
            self._opened.__exit__(*error)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute weight normalisation by plain operations.

    Torch's own (2.13) has no forward derivative, and a wrong second one.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


WRITTEN: dict[Any, Callable[..., Any]] = {torch._weight_norm: weight_norm, **CONTROL_FLOW}
"""{function whose derivatives torch has not, or wrong: the same by plain operations}"""


class Branching(TorchFunctionMode):
    """A mode in which branches and loops of torch's compiler run as Python runs them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CONTROL_FLOW.get(func, func)(*args, **(kwargs or {}))


_cuda = torch.backends.cuda
_FLAGS: tuple[tuple[Callable[[], bool], Callable[[bool], None], bool], ...] = (
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp, False),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp, False),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp, False),
    (torch._C._get_overrideable_sdp_enabled, torch._C._set_sdp_use_overrideable, False),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp, True),
)
"""(is on, turn on or off, what it must be) of every kernel of attention, on CPUs too."""


class _Unfused:
    """A context without fused attention, whose flags are the process's, not the thread's.

    The first that comes in turns them off, the last that goes out puts them back. Only flags that
    are otherwise are set: this is opened at every look, where `sdpa_kernel` cost 30 µs.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._changed: list[tuple[Callable[[bool], None], bool]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                for found, turn, wanted in _FLAGS:
                    if found() is not wanted:
                        self._changed.append((turn, not wanted))
                        turn(wanted)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for turn, before in self._changed:
                    turn(before)
                self._changed.clear()


_UNFUSED = _Unfused()


class _Plain(TorchFunctionMode):
    """A mode that calls what is in `WRITTEN` in the place of torch's own; no fused attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return WRITTEN.get(func, func)(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        _UNFUSED.__enter__()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]  # torch's

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)  # type: ignore[no-untyped-call]  # likewise
        finally:
            _UNFUSED.__exit__(*error)


def differentiable(heard: bool = False) -> AbstractContextManager[Any]:
    """Compute attention and weight norm by plain operations inside.

    The fused ones have no second and no forward derivatives.

    Args:
        heard: whether somebody who listens to every call sees to weight norm.
    """
    return _UNFUSED if heard else _Plain()
