"""Results of benchmarks as files: JSON with the machine and versions beside them.

The documentation draws its tables from `analyses/benchmarks/results/`. A script that is run with
`--record` writes its file there; the rows of a file take the place of those of the same heads.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy
import torch

import curvlab

RESULTS = Path(__file__).parent / "results"

Cell = str | float | None


def machine() -> dict[str, str | int | float]:
    """What the figures hang on: processor, cores, threads, load, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "curvlab": curvlab.__version__,
    }


def _told(word: str) -> str:
    """A word of the command; of a path of this machine its last name alone."""
    return f"../{Path(word).name}" if Path(word).is_absolute() else word


def record(
    name: str, what: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], heads: int = 1
) -> Path:
    """Write the rows to `results/NAME.json`, beside rows of other heads that stand there.

    Args:
        name: of the file.
        what: the caption: what is measured, in which unit.
        columns: names of the columns.
        rows: one cell a column; the first `heads` say what a row is of.
        heads: cells of a row that say what it is of.
    """
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    new = [list(row) for row in rows]
    told = {tuple(row[:heads]) for row in new}
    found = {
        "what": what,
        "command": " ".join(["python", f"analyses/benchmarks/{Path(sys.argv[0]).name}"])
        + "".join(f" {_told(word)}" for word in sys.argv[1:]),
        "machine": machine(),
        "columns": list(columns),
        "rows": [*(row for row in kept if tuple(row[:heads]) not in told), *new],
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path
