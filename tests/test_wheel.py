"""An installed copy works without network and outside the checkout, its data included."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (
    "import curvlab; print(curvlab.__path__[0]);"
    " print(*[len(curvlab.datasets.load(name)[0]) for name in ('mnist16', 'shakespeare')])"
)


def test_the_wheel_carries_the_data_and_works_elsewhere(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*words, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {
            f"curvlab/_data/{name}"
            for name in ("mnist.npz", "shakespeare.txt.xz", "shakespeare.LICENSE")
        } <= set(archive.namelist())
        assert {
            "curvlab/py.typed",
            "curvlab/templates/report.html",
            "curvlab/templates/report.css",
        } <= set(archive.namelist())
        assert "curvlab/analyses/thesis/figure_2_2.py" in archive.namelist()
        assert not [
            name for name in archive.namelist() if name.endswith((".png", ".pyc", ".ipynb"))
        ]
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CURVLAB_DATA": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site" / "curvlab"), "60000", "11224"]
    words = [
        sys.executable,
        "-m",
        "curvlab",
        "reproduce",
        "table-2.4",
        "--budget",
        "smoke",
        "--out",
        "out",
    ]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as printed") == 3
