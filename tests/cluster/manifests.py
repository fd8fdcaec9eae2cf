"""The manifests of cluster/kubernetes as kubectl builds them, and what they are checked against."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "cluster" / "kubernetes"
VERSION = "1.34.0"
"""Of Kubernetes, whose schemas manifests are checked against."""

BUILT = ("base", "overlays/small", "overlays/large", "batch", "service")
JOBS = tuple(sorted(path.stem for path in (KUBERNETES / "jobs").glob("*.yaml")))

Manifest = dict[str, Any]


def program(name: str) -> str:
    """Return the path of a program that a package of the tests brings along."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is missing; install the project's dev extra"
    return found


@cache
def built(name: str) -> list[Manifest]:
    """Return the resources of a kustomization; they are shared, so nobody may change them."""
    command = [program("kubectl"), "kustomize", str(KUBERNETES / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def job(name: str) -> Manifest:
    """Return a RayJob for the running cluster."""
    return yaml.safe_load((KUBERNETES / "jobs" / f"{name}.yaml").read_text())


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the only resource of a kind."""
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def cluster_of(manifests: list[Manifest]) -> Manifest:
    """Return the specification of the one Ray cluster, whatever makes it."""
    places = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    (found,) = [manifest for manifest in manifests if manifest["kind"] in places]
    spec = found["spec"]
    for place in places[found["kind"]]:
        spec = spec[place]
    return spec


def groups_of(cluster: Manifest) -> list[Manifest]:
    """Return the head's and the workers' groups."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container_of(group: Manifest) -> Manifest:
    """Return the only container of a group's pods."""
    (container,) = group["template"]["spec"]["containers"]
    return container


def values(content: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key, however deep."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from values(value, key)


@cache
def _kuberay() -> Draft202012Validator:
    folder = resources.files(kubernetes_validate) / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    schema = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
    Draft202012Validator.check_schema(schema)

    def kubernetes(name: str) -> Resource[Any]:
        return DRAFT202012.create_resource(json.loads((folder / Path(name).name).read_text()))

    return Draft202012Validator(schema, registry=Registry(retrieve=kubernetes))  # type: ignore[call-arg]


def check(manifest: Manifest) -> None:
    """Raise a jsonschema.ValidationError unless Kubernetes, or KubeRay's operator, would take it."""
    if manifest["apiVersion"].startswith("ray.io/"):
        _kuberay().validate(manifest)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
