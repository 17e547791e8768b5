"""DOCUMENT_GRIDS: the grids over which the documents searched, by name.

A grid is by algorithm, as the documents give it: dampings are each method's own (λ, or ε of Adam,
RMSprop, Shampoo and TNT), and SGD with momentum has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from curvlab.errors import CurvlabError
from curvlab.sweeps.grid import GridAxis

_Numbers = tuple[float, ...]


@dataclass(frozen=True)
class DocumentGrid:
    """A document's grid.

    Args:
        summary: what was searched for, and on which problems.
        source: where it stands.
        best: what was made least, at the end of any epoch.
        axes: {algorithm: {option: values}}.
    """

    summary: str
    source: str
    best: str
    axes: Mapping[str, Mapping[str, _Numbers]]

    def of(self, algorithm: str) -> tuple[GridAxis, ...]:
        """Return the axes of an algorithm.

        Raises:
            CurvlabError: the document has no grid for it.
        """
        if algorithm not in self.axes:
            raise CurvlabError(
                f"the grid of {self.source} has no '{algorithm}' (known: {', '.join(self.axes)}):"
                " leave it out, or give --grid NAME=VALUES"
            )
        return tuple(GridAxis(name, values) for name, values in self.axes[algorithm].items())


def _each(names: str, lr: _Numbers, **others: _Numbers) -> dict[str, Mapping[str, _Numbers]]:
    return {name: MappingProxyType({"lr": lr} | others) for name in names.split()}


_2_5 = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_3_5 = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
_QN_LR = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3)
_QN_DECAY = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1)
_CNN_KFAC = {
    "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
    "weight_decay": (1e-3, 0.01, 0.1, 1.0),
    "damping": (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0),
}
_CNN_ADAM = {
    "lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
    "weight_decay": (0.01, 0.1, 1.0, 10.0),
    "damping": (1e-8, 1e-4, 0.01, 0.1, 1.0),
}
_CNN_SGD = {
    "lr": (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
    "weight_decay": (1e-3, 0.01, 0.1, 1.0),
}
_4_3 = (
    _each("sgd-m", (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03))
    | _each("adam", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01), damping=(1e-8, 1e-4, 1e-2))
    | _each(
        "shampoo",
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        damping=(1e-4, 3e-4, 1e-3, 3e-3, 0.01),
    )
    | _each(
        "tnt",
        (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
        damping=(1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
    )
    | _each(
        "kfac",
        (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
        damping=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    )
)
_MOMENTA: tuple[dict[str, _Numbers], ...] = (
    {"momentum": (0.9, 0.99, 0.999), "decay": (0.9, 0.99, 0.999)},
    {"momentum": (0.9, 0.99, 0.999)},
)
"""μ and β; SGD with momentum has no β."""

DOCUMENT_GRIDS: Mapping[str, DocumentGrid] = MappingProxyType(
    {
        "thesis-table-2.5": DocumentGrid(
            "autoencoders, batches of 1000: the values of Figure 2.2",
            "thesis 2.8.2",
            "train_loss",
            _each("k-bfgs-20 k-bfgs-l-20", _2_5, damping=(3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0))
            | _each("kfac-20", _2_5, damping=(3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0))
            | _each("adam rmsprop", _2_5, damping=(1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1))
            | _each("sgd-m", _2_5),
        ),
        "thesis-figure-2.3": DocumentGrid(
            "autoencoders: the landscape of Figure 2.3",
            "thesis 2.8.2",
            "train_loss",
            _each(
                "k-bfgs-20 k-bfgs-l-20",
                (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
                damping=(1e-2, 3e-2, 0.1, 0.3, 1.0),
            ),
        ),
        "thesis-table-3.5": DocumentGrid(
            "autoencoders, batches of 1000: the values of Table 3.3",
            "thesis 3.7.2",
            "train_loss",
            _each("k-bfgs k-bfgs-l kfac", _3_5, damping=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
            | _each("adam", _3_5, damping=(1e-8, 1e-4, 1e-3, 0.01, 0.1))
            | _each("sgd-m", _3_5),
        ),
        "thesis-table-3.7": DocumentGrid(
            "VGG16 and ResNet32, batches of 128: the values of Table 3.4",
            "thesis 3.7.2",
            "val_error",
            _each(
                "k-bfgs k-bfgs-l",
                _QN_LR,
                weight_decay=_QN_DECAY,
                damping=(1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
            )
            | _each("kfac", **_CNN_KFAC)
            | _each("adam", **_CNN_ADAM)
            | _each("sgd-m", **_CNN_SGD),
        ),
        "thesis-table-4.3": DocumentGrid(
            "autoencoders, batches of 1000: the values of Figure 4.2",
            "thesis 4.7.2",
            "train_loss",
            _4_3,
        ),
        "thesis-table-4.7": DocumentGrid(
            "autoencoders, batches of 1000: the values of Figure 4.6",
            "thesis 4.7.3",
            "train_loss",
            {
                name: MappingProxyType({**axes, **_MOMENTA[name == "sgd-m"]})
                for name, axes in _4_3.items()
            },
        ),
        "thesis-table-4.4": DocumentGrid(
            "VGG16 and ResNet32, batches of 128: the values of Figure 4.3",
            "thesis 4.7.2",
            "val_error",
            _each("sgd-m", **_CNN_SGD)
            | _each("adam", **_CNN_ADAM)
            | _each(
                "shampoo",
                (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
                weight_decay=(0.01, 0.1, 1.0, 10.0),
                damping=(1e-3, 0.01, 0.1, 1.0),
            )
            | _each(
                "tnt",
                (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
                weight_decay=(1.0, 10.0, 100.0),
                damping=(1e-3, 0.01, 0.1, 1.0),
            )
            | _each(
                "kfac",
                (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3),
                weight_decay=(1e-3, 0.01, 0.1, 1.0),
                damping=(1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0),
            ),
        ),
        "2021-table-3": DocumentGrid(
            "All-CNN-C and VGG16 on CIFAR: the values of Figures 1 and 2",
            "2021 B.2",
            "train_loss",
            _each(
                "kf-bfgs-cnn kf-bfgs-l-cnn kfac-20",
                (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3),
                damping=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
            )
            | _each(
                "adam",
                (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
                damping=(1e-12, 1e-8, 1e-4, 0.01, 0.1),
            )
            | _each("sgd-m", (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)),
        ),
    }
)
"""{name of the document's table or figure: its grid}"""
