"""What probes cost, written by analyses/benchmarks/probes.py."""

COST_MODELS = ("mlp-256-20", "mnist-ae")
COSTS: dict[str, tuple[float, float]] = {
    "damping": (0.13, 0.001),
    "bounds": (1.9, 2.5),
    "reduction": (14, 7.6),
    "error": (33, 0.001),
    "spectrum": (3.4e02, 1.9e02),
    "alignment": (3.4e02, 1.9e02),
    "condition": (1.2, 1.7),
    "memory": (0.054, 0.017),
    "noise": (0.34, 0.078),
    "cosine": (0.063, 0.017),
    "gram": (0.037, 0.018),
    "loss": (0.004, 0),
    "norms": (0.088, 0.029),
    "time": (0.003, 0),
    "lambda": (0.003, 0),
    "shift": (0.005, 0),
}
"""{probe: CPU time of one sample over plain forward and backward, for each of COST_MODELS,
minibatches of 1000}
"""
