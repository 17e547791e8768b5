"""A device that is not there, and computes: "gpu", whose tensors hold true numbers in the memory of
the host, and on which every operation is seen.

Tensors of two devices in one operation raise, as on CUDA; what would wait for the device is noted
with the place in the package that asked. It is torch's private hook for backends written in Python
(`_setup_privateuseone_for_python_backend`) with a wrapper class on top, which is for good: use it
in a process of its own (`forked`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import curvlab

aten = torch.ops.aten
NAME = "gpu"
_PACKAGE = str(Path(curvlab.__file__).parent) + "/"

READS = {
    "_local_scalar_dense": "number read",
    "equal": "number read",
    "is_nonzero": "number read",
    "nonzero": "shape read",
    "masked_select": "shape read",
    "_unique": "shape read",
    "_unique2": "shape read",
    "unique_dim": "shape read",
    "unique_consecutive": "shape read",
    "bincount": "shape read",
    # factorisations whose kernels read whether they have succeeded; `cholesky_ex` and its like
    # leave that on the device, and `cholesky` is one of them and a `_linalg_check_errors`
    "_linalg_check_errors": "factorisation checked",
    "_linalg_eigh": "factorisation checked",
    "_linalg_svd": "factorisation checked",
    "linalg_eig": "factorisation checked",
    "linalg_lstsq": "factorisation checked",
    "cholesky_inverse": "factorisation checked",
    # reads whether what it is given are probabilities
    "multinomial": "number read",
}
"""{operation: why CUDA's of that name waits}; index by booleans and copies are beside it."""


class MixedDevices(Exception):
    """Tensors of two devices met in one operation."""


class Pretended(Tensor):
    """A tensor on the pretended device. `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is disabled
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:  # torch's own refuses wrappers
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:  # torch's own swaps what wrappers lack
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Pretended)
        assert value.shape == self.shape
        self.held = value.held


def _indices(index: Any) -> Any:
    """Lists as tensors of the host, which they are on their way to any device: torch's own way is
    not seen.
    """
    if isinstance(index, tuple):
        return tuple(_indices(i) for i in index)
    return torch.tensor(index, dtype=torch.long) if isinstance(index, list) else index


class Device(TorchDispatchMode):
    """Lets the device exist inside, and keeps what would have waited for it: `waits`, of
    (place, why).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports all of it, for seconds

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


class _Generator(torch.Generator):
    """A generator of the host that was made for a device: known by its seed, since an operation is
    handed another wrapper of it.
    """

    ours: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Self:
        made = super().__new__(cls)
        made.there = torch.device(device).type == NAME
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def manual_seed(self, seed: int) -> Self:
        if self.there:
            self.ours.add(seed)
        super().manual_seed(seed)
        return self

    there: bool


def _by_the_host(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a tensor of the host first, and sends it: what it is on CUDA too."""

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return original(data, device=device, **options)
        return original(data, **options).to(device)

    return make


@contextmanager
def pretended() -> Iterator[Device]:
    """Set the device up, in this process for good, and let it be used inside."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch.Generator = _Generator  # type: ignore[misc]  # torch has none for such a device
    for name in ("tensor", "as_tensor"):  # whose way from a list is below what a mode sees
        setattr(torch, name, _by_the_host(getattr(torch, name)))
    with Device() as device:
        yield device


def _run(func: Any, args: Any, kwargs: Any, waits: list[tuple[str, str]] | None = None) -> Any:
    tensors: list[Tensor] = []
    held = [_held(a, tensors) for a in args]
    named = {key: _held(a, tensors) for key, a in kwargs.items()}
    asked = kwargs.get("device")
    made = asked is not None and torch.device(asked).type == NAME
    if not made and not any(type(t) is Pretended for t in tensors):
        return func(*args, **kwargs)
    name, writes = _schema(func)
    why = _why(func, name, args, kwargs)
    if why and waits is not None:
        waits.append((_place(), why))
    _check_mixed(func, name, tensors, kwargs.get("generator"))
    if func is aten._efficientzerotensor.default:  # forward derivatives' zero without a storage
        func = aten.zeros.default
    if asked is not None:
        named["device"] = torch.device("cpu")
    if named.get("pin_memory"):
        named["pin_memory"] = False
    found = func(*held, **named)
    if asked is not None and not made:  # to the host
        return found
    if writes is None:
        return _wrapped(found)
    into = [kwargs[key] if isinstance(key, str) else args[key] for key in writes]
    return into[0] if len(into) == 1 else tuple(into) or found


def _held(value: Any, tensors: list[Tensor]) -> Any:
    """An argument as the host has it; its tensors are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.held if type(value) is Pretended else value
    if isinstance(value, list | tuple):
        return type(value)([_held(v, tensors) for v in value])
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pretended(value)
    if isinstance(value, list | tuple):
        return type(value)([_wrapped(v) for v in value])
    return value


@cache
def _schema(func: Any) -> tuple[str, list[str | int] | None]:
    """The operation's name; and which arguments it returns, as it writes into them."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    if not schema.is_mutable:
        return name, None
    places: dict[Any, str | int] = {}
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            places[frozenset(a.alias_info.before_set)] = a.name if a.kwarg_only else i
    own = [r.alias_info for r in schema.returns]
    if any(a is None or not a.is_write for a in own):
        assert not schema.returns or not any(a is not None and a.is_write for a in own), name
        return name, [] if not schema.returns else None
    return name, [places[frozenset(a.before_set)] for a in own]


def _why(func: Any, name: str, args: Any, kwargs: Any) -> str:
    """Why the operation would wait for the device; empty where it would not."""
    if name in READS:
        return READS[name]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        # a single value at places of a mask is `masked_fill`
        filled = name != "index" and args[2].numel() == 1 and len(masks) == len(args[1])
        if masks and not filled:
            return "shape read"
        if any(t is not None and not isinstance(t, Pretended) for t in args[1]):
            return "copy to the device"
    if name == "repeat_interleave" and func is aten.repeat_interleave.Tensor:
        return "" if kwargs.get("output_size") is not None else "shape read"
    if kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]):
        return ""
    if name == "_to_copy" and kwargs.get("device") is not None:
        source, target = args[0].device.type, torch.device(kwargs["device"]).type
    elif name == "copy_":
        source, target = args[1].device.type, args[0].device.type
    else:
        return ""
    if source == target:
        return ""
    return "copy to the device" if target == NAME else "copy to the host"


_MOVING = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take tensors of two devices on CUDA too."""


def _check_mixed(func: Any, name: str, tensors: list[Tensor], generator: Any) -> None:
    if generator is not None and generator.initial_seed() not in _Generator.ours:
        raise MixedDevices(f"{name} on {NAME} with a generator of the host, in {_place()}")
    if name in _MOVING:
        return
    others = [t for t in tensors if not isinstance(t, Pretended)]
    # a number of the host, as of torch.tensor(1.0), enters an elementwise operation as a scalar
    if any(t.ndim or torch.Tag.pointwise not in func.tags for t in others):
        shapes = ", ".join(f"{t.device.type}{list(t.shape)}" for t in tensors)
        raise MixedDevices(f"{name} of {shapes} in {_place()}")


def _place() -> str:
    """module:function of the package nearest to where this was asked for."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.endswith("/finite.py"):
            module = file.removeprefix(_PACKAGE).removesuffix(".py").replace("/", ".")
            return f"{module}:{frame.f_code.co_qualname.split('.<')[0]}"
        frame = frame.f_back
    return "outside of the package"
