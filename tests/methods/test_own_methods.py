"""Methods of one's own, which the environment names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from unianom.methods import OWN_METHODS


@pytest.mark.parametrize("named", [True, False])
def test_a_method_is_known_where_the_environment_names_it(named: bool) -> None:
    environment = {**os.environ, OWN_METHODS: "pipelines.benchmarks.waiting_method:register" if named else ""}
    code = "from unianom.methods import METHODS; print('waiting' in METHODS)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(named)
