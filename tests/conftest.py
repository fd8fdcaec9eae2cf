"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images and weights; tests that need it are skipped where it is absent."""
    named = os.environ.get("UNIANOM_REAL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "real"
    if not (folder / "images").is_dir():
        pytest.skip(f"no real images in {folder}; set UNIANOM_REAL_DATA to their folder")
    return folder
