"""One thread: the tests' tensors are tiny, and results then do not depend on the machine's number of cores."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import `problems`
torch.set_num_threads(1)
