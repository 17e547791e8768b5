"""Likelihoods: loss per example, sampling of labels, root of the Hessian in the outputs.

A likelihood is one small class with four methods (write your own the same way). Every loss is the
**negative log-likelihood of one example, summed over its outputs and places** and up to a constant;
the objective takes the mean over examples. Where a class of yours needs the data's labels for
`root` or `sample` (weights, a mask), it takes them as a last argument `y`.

A fifth method, `factor(y)`, is for a mean over something else: what it returns for the labels of a
minibatch, N/M of N examples and M counted places, multiplies the mean over examples, and with it
every curvature matrix.
"""

from __future__ import annotations

from curvlab.likelihoods.base import Likelihood, root_of, sample_of
from curvlab.likelihoods.categorical import Categorical, Tokens
from curvlab.likelihoods.elementwise import Bernoulli, Gaussian
from curvlab.likelihoods.heads import Heads

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Heads",
    "Likelihood",
    "Tokens",
    "root_of",
    "sample_of",
]

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "tokens": Tokens,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}
