"""Training along one algorithm: `run` by your objects or by name; `loop`, `settings`, and
`records`, what a run logs.

What the loop is made of: `schedules` (SCHEDULES), `evaluation` (loss and error of data sets),
`checkpoint` (one whole file).
"""

from curvlab.training.run import TrainRun, train

__all__ = ["TrainRun", "train"]
