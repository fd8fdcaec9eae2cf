"""The core package where Ray, MLflow and Optuna are not installed."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow", "optuna"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import dataclasses
import numpy as np
import torch
import unianom
from tests.methods.conftest import TINY, tiny_method
from unianom.memory.coreset import greedy_coreset
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS
from unianom.model import Model

images = [np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8) for number in range(3)]

method = METHODS["patchcore"](TINY["patchcore"].config).eval()
with torch.inference_mode():
    found = method.embed_for_bank(torch.rand(4, 3, method.input.side, method.input.side))
patches = found.patches[found.keep].numpy()
method.bank = MemoryBank.build(patches[np.sort(greedy_coreset(patches, 20, 0).indices)])
Model(method, ["all"]).save("model")
results = unianom.load("model").predict(images)
assert len(results) == 3 and all(result.score > 0 for result in results)

trained = METHODS["uniad"](TINY["uniad"].config).train()
losses = trained.training_loss(TINY["uniad"].training_batch(trained))
sum(losses.values()).backward()
assert any(parameter.grad is not None for parameter in trained.parameters())

assert not {"ray", "mlflow", "optuna", "pipelines"} & {name.split(".")[0] for name in sys.modules}
print("done")
"""


def test_a_bank_is_fitted_loaded_and_a_step_trained(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr[-2000:]
