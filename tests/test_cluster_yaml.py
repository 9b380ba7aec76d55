"""cluster.yaml is what the cluster launcher takes: checked against Ray's own schema, with no cloud and no cluster."""

import copy
import re
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"validating cluster.yaml connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def validated(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster):
    assert validated(cluster)["head_node_type"] == "head"


def test_the_check_bites(cluster):
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validated(cluster | {"idle_timeout_minute": 5})
    with pytest.raises(ValueError, match="head_node_type"):
        validated(cluster | {"head_node_type": "nobody"})
    cluster["available_node_types"]["head"]["resources"]["CPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match="integer"):
        validated(cluster)


def test_the_head_only_holds_drivers(cluster):
    head = cluster["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0, "trial_driver": 100}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_only_students_are_on_spot_machines(cluster):
    kinds = cluster["available_node_types"].items()
    assert [name for name, kind in kinds if "InstanceMarketOptions" in kind["node_config"]] == ["gpu_student"]


def test_the_workers_may_all_be_up_at_once(cluster):
    workers = [kind for name, kind in cluster["available_node_types"].items() if name != "head"]
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in workers)


def test_image_and_constraints_have_the_same_ray(cluster):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pinned[1]}-py311-cu")


def test_nothing_but_the_tunnel_reaches_the_dashboard_and_the_token_stays_out(cluster):
    (start,) = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "RAY_AUTH_TOKEN" not in TEXT
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
