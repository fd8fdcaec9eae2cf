"""What CONTRIBUTING.md says of a new layout and a new job, done to the letter in a copy of the packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.sharded import write_shards
from unianom.data.image import encode_png

ROOT = Path(__file__).parents[2]


def code_of(section: str) -> str:
    """Return the one block of Python in a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.fixture
def project(tmp_path):
    """A copy of the packages, to which a file is added."""
    for name in ("unianom", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


READ = """
from pipelines.data.options import IngestOptions
from unianom.data.layouts import LAYOUTS, iter_samples, make_options

options = IngestOptions("two_folders", "images", "shards", layout_options={"category": "007"})
chosen = make_options(LAYOUTS[options.layout], options.layout_options)
for sample in iter_samples(options.layout, options.source, chosen):
    print(sample.sample_id, sample.category, sample.split, sample.label, sample.defect)
"""


def test_a_layout_is_one_file(project):
    (project / "unianom/data/layouts/two_folders.py").write_text(code_of("A layout"))
    for folder, count in (("good", 2), ("bad", 1)):
        (project / "images" / folder).mkdir(parents=True)
        for number in range(count):
            picture = encode_png(np.full((8, 8, 3), 40 * number, np.uint8))
            (project / "images" / folder / f"{number}.png").write_bytes(picture)
    done = run(project, "-c", READ)
    assert done.stdout.splitlines() == [
        "images/good/0.png 007 train 0 good",
        "images/good/1.png 007 train 0 good",
        "images/bad/0.png 007 test 1 bad",
    ], done.stderr
    arguments = ["--layout", "two_folders", "--source", "nowhere", "--output", "shards"]
    done = run(project, "jobs/ingest.py", *arguments, "--layout_options.categry", "x")
    assert done.returncode == 2
    assert "layout two_folders has no option 'categry' (did you mean 'category'?)" in done.stderr
    done = run(project, "jobs/ingest.py", *arguments)
    assert done.returncode == 1
    assert "nowhere" in done.stderr


def test_a_job_is_one_file(project):
    (project / "jobs/count.py").write_text(code_of("A job"))
    done = run(project, "-m", "jobs", "count", "--help")
    assert done.returncode == 0
    assert "usage: unianom count --shards VALUE --output VALUE [options]" in done.stdout
    assert "leave out categories with fewer images (default: 0)" in " ".join(done.stdout.split())
    done = run(project, "jobs/count.py", "--help-all")
    assert "leave out categories with fewer images. (at least 0; default: 0)" in " ".join(done.stdout.split())
    done = run(project, "-m", "jobs")
    assert re.search(r"^Others:\n  count +Count the images of a shard set\.$", done.stdout, re.MULTILINE)
    done = run(project, "jobs/count.py", "--shards", "s", "--output", "o", "--least", "-1")
    assert (done.returncode, done.stderr) == (2, "error: least=-1 must be at least 0\n")
    write_shards(project / "shards")
    for _ in range(2):  # the second time it is done already
        done = run(project, "jobs/count.py", "--shards", "shards", "--output", "counts")
        assert done.returncode == 0, done.stderr
    assert json.loads((project / "counts/counts.json").read_text()) == {"bolt": 17, "nut": 14, "washer": 12}
    other = run(project, "jobs/count.py", "--shards", "shards", "--output", "counts", "--least", "1000")
    assert other.returncode == 1
    assert "--overwrite true" in other.stderr
