"""Ten lines: your own module and data, in no table. Prints mean cosines to the block Fisher
direction by method and block.
"""

import torch

import curvlab as cl

x, y = torch.randn(2000, 12), torch.randint(0, 3, (2000,))
nn = torch.nn
model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))
objective = cl.Objective(model, cl.likelihoods.Categorical(), seed=0)
batches = list(zip(x.split(200), y.split(200), strict=True))
methods = ["kfac", "tnt", "shampoo"]
run = cl.compare(objective, batches * 3, algorithms=methods, warm=batches, damping=0.01)
print(run.table().to_pandas().round(3))
