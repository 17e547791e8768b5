"""What refreshing the inverses every T₂ steps costs in cosine and saves in time, against refreshing
at every step.

python analyses/refresh.py [--every 1 2 5 10 20] [--steps 300]
"""

import argparse
import time

import pandas as pd
import torch

import curvlab as cl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 5, 10, 20])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=1000)
options = parser.parse_args()
torch.set_num_threads(1)  # so that CPU seconds are a step's

train, _ = cl.datasets.load("mnist16")
rows = {}
for every in options.every:
    objective = cl.Objective(
        cl.models.build("mlp-256-20", seed=0), cl.likelihoods.Categorical(), seed=0
    )
    start = time.process_time()
    run = cl.compare(
        objective,
        train.batches(options.batch_size, epochs=5),
        lr=0.03,
        refresh_every=every,
        steps=options.steps,
    )
    seconds = time.process_time() - start
    middle = run.table().isel(block=slice(1, -1)).mean("block").to_series().drop("block-fisher")
    rows[every] = {"CPU s": seconds, "last loss": float(run.dataset["loss"][-1])} | middle.to_dict()
print(pd.DataFrame(rows).T.rename_axis("refresh every").round(3).to_string())
