"""Sweeps: a grid of settings × algorithms × seeds of `train` or `compare`, a point at a time."""
