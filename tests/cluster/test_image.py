"""The image, the runtime environment and the machines of AWS name what there is."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from tests.cluster.manifests import KUBERNETES, ROOT, program

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("unianom", "pipelines", "jobs")


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage, continued lines joined, by its name."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {"": []}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("FROM "):
            found[line.rpartition(" AS ")[2]] = []
        if line:
            found[list(found)[-1]].append(line)
    return found


def test_the_dockerfile_has_no_findings() -> None:
    done = subprocess.run([program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    dependencies, final = stages()["dependencies"], stages()["final"]
    (install,) = [line for line in dependencies if "pip install --constraint" in line]
    assert '--constraint constraints.txt ".[${EXTRAS}]"' in install
    assert final[-1].startswith("CMD ")
    users = [line.split()[1] for line in final if line.startswith("USER ")]
    assert users == ["1000:1000"]
    account = yaml.safe_load((KUBERNETES / "base" / "raycluster.yaml").read_text())["spec"]["headGroupSpec"]
    assert account["template"]["spec"]["securityContext"]["runAsUser"] == 1000
    root = final.index("USER 1000:1000")
    assert not [line for line in final[root:] if line.startswith("RUN ")]
    assert sum(line.startswith("HEALTHCHECK ") for line in final) == 1


def test_build_arguments_are_extras_of_the_project() -> None:
    text = DOCKERFILE.read_text()
    extras = set(re.findall(r"EXTRAS=([a-z,]+)", text))
    assert extras == {"gpu", "cpu"}
    assert extras <= set(PROJECT["optional-dependencies"])
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert python
    assert PROJECT["requires-python"] == f">={python[1]}"


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in seen)
    copied = {
        name
        for lines in stages().values()
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == seen
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt", *PACKAGES}
    assert copied == needed


@pytest.fixture(scope="module")
def runtime_env() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())


def test_ray_takes_the_runtime_environment(runtime_env: dict[str, Any]) -> None:
    taken = RuntimeEnv(**{**runtime_env, "working_dir": None})
    constraint, project = taken["pip"]["packages"]
    working = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
    assert constraint == f"--constraint {working}/constraints.txt"
    extra = re.fullmatch(re.escape(working) + r"\[(\w+)\]", project)
    assert extra
    assert extra[1] in PROJECT["optional-dependencies"]
    assert all((ROOT / path.lstrip("/")).exists() for path in runtime_env["excludes"] if path != "/notebooks")


def test_what_is_uploaded_suffices_to_install_and_run(runtime_env: dict[str, Any], tmp_path: Path) -> None:
    create_package(
        str(ROOT),
        tmp_path / "package.zip",
        include_gitignore=True,
        excludes=[*get_runtime_env_default_excludes(), *runtime_env["excludes"]],
    )
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        names = [name for name in package.namelist() if not name.endswith("/")]
    top = {name.partition("/")[0] for name in names}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", *PACKAGES} <= top
    assert not {"tests", "cluster", ".git"} & top
    sources = {str(path.relative_to(ROOT)) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    assert sources <= set(names)
    assert not [name for name in names if fnmatch(name, "*.pyc")]


def test_rays_launcher_takes_the_machines_of_aws() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    whole = prepare_config(config)
    validate_config(whole)
    # Ray's defaults would install another Ray
    assert not whole["setup_commands"] + whole["head_setup_commands"] + whole["worker_setup_commands"]
    assert whole["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in whole["docker"]["run_options"]
    assert whole["available_node_types"]["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    images = yaml.safe_load((KUBERNETES / "components" / "images" / "kustomization.yaml").read_text())["images"]
    assert whole["docker"]["image"] in {f"{image['newName']}:{image['newTag']}" for image in images}
    wrong = {**config, "docker": {**config["docker"], "images": "x"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json.loads(schema.read_text()))
