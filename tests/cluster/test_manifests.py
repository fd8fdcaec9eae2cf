"""The manifests are what Kubernetes and KubeRay take, and fit each other and the project."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.manifests import (
    BUILT,
    JOBS,
    KUBERNETES,
    ROOT,
    Manifest,
    built,
    check,
    cluster_of,
    container_of,
    groups_of,
    job,
    one,
    values,
)

CLUSTERS = tuple(name for name in BUILT if name != "base")
"""What users apply; the base is a part of each."""


def ray_job(name: str) -> tuple[Manifest, str]:
    """Return a RayJob, and where the cluster is described that it runs on."""
    return (one(built("batch"), "RayJob"), "batch") if name == "batch" else (job(name), "overlays/large")


@pytest.mark.parametrize("name", BUILT)
def test_what_is_applied_is_valid(name: str) -> None:
    manifests = built(name)
    for manifest in manifests:
        check(manifest)
        assert manifest["metadata"].get("namespace") == "unianom"
    made = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_valid(name: str) -> None:
    check(job(name))
    assert f"jobs/{name}.yaml" in (KUBERNETES / "jobs" / f"{name}.yaml").read_text()


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """Return a copy that holds another value at a path."""
    manifest = copy.deepcopy(manifest)
    *parts, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inside: Any = manifest
    for part in parts:
        inside = inside[part]
    inside[last] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.enableInTreeAutoscalin", True),
        ("spec.authOptions.mode", "tokens"),
        ("spec.autoscalerOptions.resources.limits.cpu", ["1"]),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.headGroupSpec.template.spec.restartPolicy", "Always"),
        ("spec.headGroupSpec.template.spec.containers.0.envFrom.0.configMap", {"name": "x"}),
        ("spec.workerGroupSpecs.0.maxReplicas", -1),
        ("spec.workerGroupSpecs.1.groupName", "GPU"),
        ("spec.workerGroupSpecs.1.template.spec.tolerations.0.effect", 1),
        ("spec.gcsFaultToleranceOptions", {"redisPassword": {"value": "x"}}),
        ("metadata.name", "Unianom"),
    ],
)
def test_a_mistake_in_a_cluster_is_found(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(changed(one(built("base"), "RayCluster"), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimit", 3),
        ("spec.shutdownAfterJobFinishes", True),
        ("spec.ttlSecondsAfterFinished", 60),
        ("spec.submissionMode", "SidecarMode"),
        ("spec.rayClusterSpec", cluster_of(built("base"))),
        ("spec.entrypoint", ["unianom", "score"]),
    ],
)
def test_a_mistake_in_a_job_on_a_running_cluster_is_found(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(changed(job("score"), path, value))


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_is_named_is_there(name: str) -> None:
    manifests = built(name)
    there = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    readme = (ROOT / "cluster" / "README.md").read_text().replace("\\\n", " ")
    secrets = {
        words[4]: {word.partition("=")[2].partition("=")[0] for word in words if word.startswith("--from-literal=")}
        for line in readme.splitlines()
        if line.startswith("kubectl create secret generic ")
        for words in [line.split()]
    }
    for reference in (
        reference for kind in ("configMapRef", "configMapKeyRef") for reference in values(manifests, kind)
    ):
        assert ("ConfigMap", reference["name"]) in there
    for reference in values(manifests, "secretKeyRef"):
        assert reference["key"] in secrets[reference["name"]]
    for reference in values(manifests, "secretRef"):
        assert reference["name"] in secrets
    assert "auth_token" in secrets[cluster_of(manifests)["authOptions"]["secretName"]]
    for account in values(manifests, "serviceAccountName"):
        assert ("ServiceAccount", account) in there
    for claim in values(manifests, "claimName"):
        assert ("PersistentVolumeClaim", claim) in there
    for group in groups_of(cluster_of(manifests)):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container_of(group)["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", CLUSTERS)
def test_images_and_versions_are_the_projects(name: str) -> None:
    cluster, version = (
        cluster_of(built(name)),
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
    )
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    for group in groups_of(cluster):
        kind = "cuda" if "nvidia.com/gpu" in container_of(group)["resources"]["limits"] else "cpu"
        assert container_of(group)["image"].endswith(f"/unianom:{version}-{kind}")


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_get_what_ray_counts(name: str) -> None:
    cluster = cluster_of(built(name))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups_of(cluster):
        resources, spec = container_of(group)["resources"], group["template"]["spec"]
        assert resources["requests"] == resources["limits"]  # Ray counts limits, Kubernetes places by requests
        tolerated = {toleration["key"] for toleration in spec.get("tolerations", ())}
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in resources["limits"])
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
    for group in cluster["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] > 0


@pytest.mark.parametrize("name", [*JOBS, "batch"])
def test_an_entrypoint_is_a_command_whose_workers_fit(name: str) -> None:
    manifest, place = ray_job(name)
    program, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "unianom"
    command = [sys.executable, "-m", "jobs", *arguments, "--print_config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runtime = yaml.safe_load(done.stdout)["runtime"]
    limits = [container_of(group)["resources"]["limits"] for group in cluster_of(built(place))["workerGroupSpecs"]]
    assert any(
        int(limit["cpu"]) >= runtime["cpus_per_worker"]
        and int(limit.get("nvidia.com/gpu", 0)) >= runtime["gpus_per_worker"]
        for limit in limits
    )


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_for_the_cluster_of_the_overlays(name: str) -> None:
    selector = job(name)["spec"]["clusterSelector"]
    for overlay in ("overlays/small", "overlays/large"):
        assert selector == {"ray.io/cluster": one(built(overlay), "RayCluster")["metadata"]["name"]}


def test_the_small_cluster_has_a_disk_in_every_pod() -> None:
    cluster = cluster_of(built("overlays/small"))
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == ["cpu", "gpu"]
    claim = one(built("overlays/small"), "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups_of(cluster):
        assert {"name": "data", "mountPath": "/data"} in container_of(group)["volumeMounts"]
        (volume,) = [volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "data"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_the_large_cluster_takes_spot_machines() -> None:
    small, large = (cluster_of(built(f"overlays/{name}")) for name in ("small", "large"))
    most = [{group["groupName"]: group["maxReplicas"] for group in each["workerGroupSpecs"]} for each in (small, large)]
    assert most == [{"cpu": 2, "gpu": 1}, {"cpu": 32, "gpu": 8, "gpu-spot": 32}]
    spot = large["workerGroupSpecs"][2]["template"]["spec"]
    assert "nodeAffinity" in spot["affinity"]
    assert spot["terminationGracePeriodSeconds"] < 30


@pytest.mark.parametrize("name", ["overlays/large", "service"])
def test_rays_state_lies_in_a_redis_that_is_there(name: str) -> None:
    manifests = built(name)
    options = cluster_of(manifests)["gcsFaultToleranceOptions"]
    service, redis = one(manifests, "Service"), one(manifests, "StatefulSet")
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    pod = redis["spec"]["template"]
    assert service["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    assert options["redisPassword"]["valueFrom"] == container["env"][0]["valueFrom"]
    claimed = {claim["metadata"]["name"] for claim in redis["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed


SERVE_TOKEN = {"secretRef": {"name": "unianom-serve"}}


@pytest.mark.parametrize("name", ["batch", "service"])
def test_a_cluster_of_its_own_is_that_of_the_base(name: str) -> None:
    assert "RayCluster" not in {manifest["kind"] for manifest in built(name)}
    own, base = copy.deepcopy(cluster_of(built(name))), copy.deepcopy(cluster_of(built("base")))
    own.pop("gcsFaultToleranceOptions", None)
    if name == "service":  # and every pod knows the token of who may ask
        assert all(container_of(group)["envFrom"].pop() == SERVE_TOKEN for group in groups_of(own))
    for cluster in (own, base):
        for group in groups_of(cluster):
            del container_of(group)["image"]
    assert own == base


def test_what_overlays_share_they_have_alike() -> None:
    """Applied one after the other, none takes back what another one said."""
    for kind in ("ConfigMap", "NetworkPolicy"):
        first, *others = (one(built(name), kind) for name in CLUSTERS)
        assert all(other == first for other in others)
    in_the_cloud = [one(built(name), "ServiceAccount") for name in ("overlays/large", "batch", "service")]
    assert in_the_cloud[0] == in_the_cloud[1] == in_the_cloud[2]


def test_the_service_names_what_it_serves() -> None:
    config = yaml.safe_load(one(built("service"), "RayService")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert application["import_path"] == "pipelines.serving.app:build"
    assert re.fullmatch(r"s3://\S+", application["args"]["model"])
    head = container_of(cluster_of(built("service"))["headGroupSpec"])
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert config["http_options"]["port"] == ports["serve"]


def test_no_manifest_holds_a_secret() -> None:
    for name in BUILT:
        assert "Secret" not in {manifest["kind"] for manifest in built(name)}


def test_every_file_is_used() -> None:
    """A file that no kustomization names would be applied by nobody."""
    named = set(KUBERNETES.rglob("kustomization.yaml"))
    for kustomization in tuple(named):
        content = yaml.safe_load(kustomization.read_text())
        paths = [
            *content.get("resources", ()),
            *(patch["path"] for patch in content.get("patches", ()) if "path" in patch),
        ]
        named |= {(kustomization.parent / path).resolve() for path in paths}
    named |= {KUBERNETES / "jobs" / f"{name}.yaml" for name in JOBS}
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} <= named
