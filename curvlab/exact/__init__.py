"""Exact matrices, the oracle: Hessian, Gauss-Newton, Π and Fisher, dense or as products.

Gradients and Jacobians of single examples are here too.
"""

from curvlab.exact.batches import KINDS, Kind
from curvlab.exact.kronecker_sum import KroneckerSum, kronecker_terms, preactivation
from curvlab.exact.matrices import matrices, matrix, routes
from curvlab.exact.occurring import Occurring, occurring
from curvlab.exact.products import diagonal, product
from curvlab.exact.route_table import ROUTES
from curvlab.exact.samples import gradients, jacobians

__all__ = [
    "KINDS",
    "ROUTES",
    "Kind",
    "KroneckerSum",
    "Occurring",
    "diagonal",
    "gradients",
    "jacobians",
    "kronecker_terms",
    "matrices",
    "matrix",
    "occurring",
    "preactivation",
    "product",
    "routes",
]
