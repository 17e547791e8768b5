"""Curvature that methods keep from step to step: one file a family, named as its paper names it."""
