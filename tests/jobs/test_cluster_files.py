"""The files in cluster/: valid for who reads them, of one version, and closed to the world."""

import copy
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLOUDS = sorted(path.name for path in (ROOT / "cluster").glob("*.yaml") if path.name != "local.yaml")
MANIFESTS = sorted(path.name for path in (ROOT / "cluster/kubernetes").glob("*.yaml"))
SCHEMAS = ROOT.parent / "shared/data/kuberay"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def loaded(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def values(found, key: str) -> list:
    """All values of `key`, wherever it is."""
    if isinstance(found, dict):
        return [
            *([found[key]] if key in found else []),
            *(v for part in found.values() for v in values(part, key)),
        ]
    return [v for part in found for v in values(part, key)] if isinstance(found, list) else []


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_takes_them(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(loaded(name))))


def test_there_is_one_for_each_place():
    assert {"aws.yaml", "gcp.yaml", "azure.yaml", "onprem.yaml"} <= set(CLOUDS)
    assert MANIFESTS == ["raycluster.yaml", "rayjob.yaml"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "azure.yaml"])
def test_workers_come_from_zero_and_go(name):
    config = loaded(name)
    types = config["available_node_types"]
    assert list(types) == ["head", "cpu", "gpu_spot", "gpu"]
    workers = {kind: values for kind, values in types.items() if kind != config["head_node_type"]}
    assert all(values["min_workers"] == 0 < values["max_workers"] for values in workers.values())
    assert types["head"]["resources"] == {"CPU": 0}
    assert all(
        (kind in ("gpu", "gpu_spot")) == ("GPU" in values["resources"]) for kind, values in types.items()
    )
    assert 1 <= config["idle_timeout_minutes"] <= 10
    spot = re.compile("spot", re.IGNORECASE)
    assert [kind for kind, values in types.items() if spot.search(json.dumps(values))] == ["cpu", "gpu_spot"]


@pytest.mark.parametrize("name", [*CLOUDS, *(f"kubernetes/{name}" for name in MANIFESTS)])
def test_all_name_the_image_of_this_version(name):
    images = values(loaded(name), "image")
    assert set(images) == {f"REGISTRY/hrm-ray:{VERSION}"}


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_but_ssh_is_open_and_the_token_is_asked_for(name):
    text = (ROOT / "cluster" / name).read_text()
    assert "0.0.0.0" not in text and "--dashboard-host=127.0.0.1" in text
    commands = [*loaded(name)["head_start_ray_commands"], *loaded(name)["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "SecurityGroup" not in text and "password" not in text.lower()


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas_and_have_no_key_that_they_do_not_know(name):
    if not SCHEMAS.exists():
        pytest.skip("KubeRay's schemas are not here")
    import jsonschema

    manifest = loaded(f"kubernetes/{name}")
    kind = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}[manifest["kind"]]
    schema = json.loads((SCHEMAS / f"{kind}.v1.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert unknown(manifest, schema) == []


def unknown(value, schema: dict, at: str = "") -> list[str]:
    """Keys that a schema does not name."""
    if isinstance(value, list):
        return [key for part in value for key in unknown(part, schema.get("items", {}), at)]
    if not isinstance(value, dict) or "properties" not in schema or "additionalProperties" in schema:
        return []
    found = [f"{at}.{key}" for key in value if key not in schema["properties"]]
    known = {key: part for key, part in value.items() if key in schema["properties"]}
    return found + [
        k for key, part in known.items() for k in unknown(part, schema["properties"][key], f"{at}.{key}")
    ]


def test_an_unknown_key_of_a_manifest_is_found():
    schema = {"properties": {"spec": {"properties": {"a": {"items": {"properties": {"b": {}}}}}}}}
    assert unknown({"spec": {"a": [{"b": 1, "c": 2}]}, "x": 1}, schema) == [".x", ".spec.a.c"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_run_the_pinned_ray_with_tokens_and_without_root(name):
    manifest = loaded(f"kubernetes/{name}")
    assert values(manifest, "rayVersion") == [PINS["ray"]]
    assert values(manifest, "authOptions") == [{"mode": "token"}]
    contexts = values(manifest, "securityContext")
    assert len(contexts) == 3 and all(c["runAsNonRoot"] and c["runAsUser"] == 1000 for c in contexts)


def test_the_image_installs_the_pins_and_is_not_root():
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert "-c constraints.txt" in text and re.search(r"^USER 1000$", text, re.MULTILINE)
    assert set(re.findall(r"hrm-ray:([\d.]+)", text)) == {VERSION}


def test_machines_that_one_has_all_join():
    """Ray does not know what they have before they do, so it would never start one for a bundle."""
    from ray.autoscaler._private.util import prepare_config

    config = loaded("onprem.yaml")
    kind = prepare_config(config)["available_node_types"]["local.cluster.node"]
    assert kind["resources"] == {} and kind["min_workers"] == len(config["provider"]["worker_ips"])


def test_the_local_cluster_has_the_node_types_of_the_clouds():
    local, aws = (loaded(name)["available_node_types"] for name in ("local.yaml", "aws.yaml"))
    assert list(local)[1:] == list(aws)[1:]
    assert all(local[kind]["resources"].keys() == aws[kind]["resources"].keys() for kind in list(aws)[1:])
