"""What CONTRIBUTING.md says of adding to the package is tried."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import unianom.methods
from pipelines.evaluation.options import LowShotOptions, protocol_options
from pipelines.runtime.cli import parse
from pipelines.training.options import train_options
from pipelines.tuning.options import tune_options
from tests.methods.conftest import INPUT, Tiny
from tests.methods.test_conformance import check_method
from unianom.configs import CONFIGS
from unianom.configs.backbone import BackboneConfig
from unianom.methods import METHODS

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "one_level"


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package of methods with the file of CONTRIBUTING.md beside its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(), flags=re.MULTILINE | re.DOTALL)
    [code] = [block for block in blocks if "register_method" in block]
    (tmp_path / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(unianom.methods, "__path__", [*unianom.methods.__path__, str(tmp_path)])
    yield unianom.methods
    METHODS.pop(NAME, None)
    CONFIGS.pop(NAME, None)
    sys.modules.pop(f"unianom.methods.{NAME}", None)


def test_a_method_is_one_file(methods: ModuleType, tmp_path: Path) -> None:
    assert NAME not in METHODS
    methods.import_methods()  # as importing the package does
    cls = METHODS[NAME]
    config = cls.Config(backbone=BackboneConfig("resnet10t", weights="random"), input=INPUT)
    tiny = Tiny(config, invalid=[{"tap": 0}], reading=[{"neighbours": 3}, {"blur_sigma": 0.0}])
    check_method(cls, tiny, tmp_path)


def test_the_command_line_knows_it_at_once(methods: ModuleType) -> None:
    given = ["--shards", "s", "--output", "o", "--method.tap", "8"]
    assert parse(train_options(), [NAME, *given]).method.tap == 8
    assert parse(protocol_options(LowShotOptions), [NAME, *given]).method.tap == 8
    assert parse(tune_options(), [NAME, *given, "--space", "{tap: [8, 16]}"]).method.tap == 8


def test_the_packages_own_methods_need_no_pytorch_for_that() -> None:
    code = "import sys; from unianom.configs import all_configs; print(len(all_configs()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(METHODS)), "False"]
