"""Files to apply: they fit KubeRay's own schema, name no field that it does not know, and hold no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay-1.7"
MANIFEST = ROOT / "deploy" / "kuberay" / "ray-cluster.yaml"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def document(kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def strict(schema: Any) -> Any:
    """The schema where a field that it does not know is an error: Kubernetes would drop it without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return made


def schema_of_ray_cluster() -> dict[str, Any]:
    file = SCHEMAS / "ray.io_rayclusters.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (found,) = (version for version in versions if version["name"] == "v1")
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return dict(schema)


def test_the_cluster_fits_the_schema() -> None:
    from jsonschema import Draft7Validator

    # Not through `validate`, which checks the schema itself, all megabytes of it.
    validator, cluster = Draft7Validator(schema_of_ray_cluster()), document("RayCluster")
    assert [error.message for error in validator.iter_errors(cluster)] == []
    for wrong in ({"tlsOption": {"enabled": True}}, {"authOptions": {"mode": "tokens"}}):
        assert not validator.is_valid(cluster | {"spec": cluster["spec"] | wrong})


def test_every_pod_has_token_and_tls_and_no_secret_stands_here() -> None:
    cluster = document("RayCluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["tlsOptions"] == {"enabled": True}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {volume["name"]: volume.get("secret", {}).get("secretName") for volume in pod["volumes"]}
        (container,) = pod["containers"]
        (path,) = (entry["value"] for entry in container["env"] if entry["name"] == "EMBERSHARD_TOKEN_FILE")
        folders = {mount["mountPath"]: mounted[mount["name"]] for mount in container["volumeMounts"]}
        assert folders[str(Path(path).parent)] == "embershard"
    assert all(document["kind"] != "Secret" for document in documents())


def test_only_the_clusters_own_pods_may_connect_to_them() -> None:
    pods = {"matchLabels": {"ray.io/cluster": document("RayCluster")["metadata"]["name"]}}
    assert document("NetworkPolicy")["spec"] == {
        "podSelector": pods,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": pods}]}],
    }
