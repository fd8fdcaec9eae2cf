"""The benchmark for GPUs, where nothing but PyTorch, timm and annotated-types is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmarks.predict_stage import PlainBank, _nearest_in_double, main

SCRIPT = """
import sys

ABSENT = ("ray", "mlflow", "optuna", "faiss", "openvino", "pyarrow", "scipy", "simplejpeg", "s3fs", "threadpoolctl",
          "rich", "docstring_parser", "jinja2", "matplotlib")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pipelines.benchmarks.predict_stage import main
main()
"""
SMALL = (
    "--device cpu --encoders vit_tiny_patch16_224 resnet10t --banks 50 90 --batch_size 2 --batches 1 --rounds 2 "
    "--side 64"
)


def test_it_runs_with_pytorch_and_timm_alone(tmp_path: Path) -> None:
    output = tmp_path / "stage.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--output", str(output), *SMALL.split()],
        cwd=Path(__file__).parents[3],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(output.read_text())
    assert [(row["method"], row["bank"], row["maps"]) for row in content["stages"]] == [
        (method, bank, maps) for method in ("uniformaly", "patchcore") for bank in (50, 90) for maps in (False, True)
    ]
    assert all(len(row["ratios"]) == 2 and row["ratio"] > 0 for row in content["stages"])
    for row in content["agreement"]:
        assert row["score apart, fp32"] < 1e-5
        assert row["search apart, fp32"] < 1e-5
        assert row["search apart, bf16"] < 1e-5
        assert 0 < row["score apart, bf16"] < 0.1
    table = done.stdout.splitlines()
    assert table[1].split() == ["encoder", "method", "bank", "maps", "images/s", "bare", "images/s", "ratio"]
    assert len(table) == 2 + 8 + 2


def test_a_result_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(SystemExit, match="is there already"):
        main(["--output", str(tmp_path / "stage.json")])


def test_its_reference_finds_the_nearest() -> None:
    vectors = PlainBank(np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)).vectors()
    distances, rows = _nearest_in_double(vectors[[3, 8]] + np.float32(0.01), vectors)
    assert rows.tolist() == [3, 8]
    np.testing.assert_allclose(distances, 5e-4, rtol=1e-3)
