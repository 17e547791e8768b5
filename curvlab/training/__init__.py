"""Training along one algorithm: `run` by your objects or by name, `loop`, `settings`, `records`.

What the loop is made of: `schedules` (SCHEDULES), `evaluation` (loss and error of data sets),
`checkpoint` (one whole file). `records` is what a run logs.
"""

from curvlab.training.run import TrainRun, train

__all__ = ["TrainRun", "train"]
