"""Choices of the documents that the command line's help needs too, which imports nothing heavy."""

FIGURE_4_1 = ("kfac", "tnt", "shampoo", "adam", "sgd-m")
"""The methods of thesis Figure 4.1, compared with `block-fisher`."""
