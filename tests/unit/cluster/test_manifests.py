"""The manifests for Kubernetes and Slurm against closed schemas: every field is known, and has a legal value.

The schemas hold the part of KubeRay's ray.io/v1 and of Kubernetes' core/v1 that the manifests use, after their API
references; anything else is refused.
"""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from launch.preflight import load_config

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "manifests"
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
CONTAINER = closed(
    "name image resources",
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=TEXT,
    ports=several(closed("containerPort", name={"type": "string", "maxLength": 15}, containerPort=PORT)),
    resources=closed("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=several(closed("name mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/"})),
)
VOLUME = closed(
    "name",
    name=TEXT,
    persistentVolumeClaim=closed("claimName", claimName=TEXT),
    emptyDir=closed("", medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITIES["additionalProperties"]),
)
TEMPLATE = closed("spec", spec=closed("containers", containers=several(CONTAINER), volumes=several(VOLUME)))
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # of `ray start`: strings alone
CLUSTER = closed(
    "rayVersion headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
    headGroupSpec=closed("rayStartParams template", rayStartParams=PARAMETERS, template=TEMPLATE),
    workerGroupSpecs=several(
        closed(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=PARAMETERS,
            template=TEMPLATE,
        )
    ),
)
JOB = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = closed("", name=TEXT, generateName=TEXT)
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


SCHEMAS = {"raycluster.yaml": resource("RayCluster", CLUSTER), "rayjob.yaml": resource("RayJob", JOB)}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_manifest_is_valid_and_whole(name: str) -> None:
    manifest = read(name)
    Draft202012Validator(SCHEMAS[name]).validate(manifest)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == volumes
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_schema_refuses_what_it_does_not_know() -> None:
    manifest = read("rayjob.yaml")
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    errors = list(Draft202012Validator(SCHEMAS["rayjob.yaml"]).iter_errors(manifest))
    assert any("'replica'" in error.message for error in errors)


def test_the_job_runs_on_the_cluster_of_the_other_manifest_and_its_command_composes() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["rayClusterSpec"] == read("raycluster.yaml")["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"env_vars"}
    program, command, *overrides = shlex.split(spec["entrypoint"])
    assert (program, command) == ("sundog", "train")
    config = load_config(overrides)
    gpus = 0
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        gpus += group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.ranks * config.cluster.gpus_per_rank == gpus
    assert config.run_dir.startswith("/shared/")


SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "requeue": "",
    "open-mode": "append|truncate",
    "signal": r"B:[A-Z]+@\d+",
    "output": r"[\w%.-]+",
}


def test_the_slurm_script_parses_and_its_options_are_legal() -> None:
    script = FOLDER / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.M))
    assert options.keys() == SBATCH.keys()
    for name, value in options.items():
        assert re.fullmatch(SBATCH[name], value), f"--{name}={value}"
