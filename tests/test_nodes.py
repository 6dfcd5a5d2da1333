"""What clusters have and can have, by their own files; requests to an autoscaler."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray import nodes
from hrm_ray.nodes import Growth, NodeType, Request, amounts, bundles_in, fit, parsed, waiting_for

CLUSTER = Path(__file__).parents[1] / "cluster"
CPU = {"CPU": 1}


def growth_of(name: str) -> Growth:
    return parsed(yaml.safe_load((CLUSTER / name).read_text()))


def test_what_the_clusters_can_have():
    aws = growth_of("aws.yaml")
    assert aws.bundles({"GPU": 1}) == 8 + 4 and aws.bundles({"CPU": 1}) == 8 * 16 + 8 * 4
    assert aws.bundles({"CPU": 16}) == 8 and aws.bundles({"CPU": 4, "GPU": 1}) == 12
    assert aws.bundles({"CPU": 17}) == 0 and aws.bundles({"CPU": 1, "GPU": 2}) == 0
    assert growth_of("local.yaml") == Growth(
        [
            NodeType("cpu", {"CPU": 1}, 2),
            NodeType("gpu_spot", {"CPU": 4, "GPU": 1}, 0),
            NodeType("gpu", {"CPU": 4, "GPU": 1}, 0),
        ],
        2,
    )
    assert growth_of("local.yaml").describe() == "2 x cpu (1 CPU)"


def test_the_head_is_no_worker_and_the_whole_has_a_limit():
    kinds = {
        "head": {"resources": {"CPU": 64}},
        "small": {"resources": {"CPU": 2}, "max_workers": 9},
        "large": {"resources": {"CPU": 8}, "max_workers": 2},
    }
    grows = parsed({"head_node_type": "head", "max_workers": 3, "available_node_types": kinds})
    assert [kind.most for kind in grows.types] == [3, 2]
    assert grows.bundles({"CPU": 1}) == 2 * 8 + 2
    assert parsed({"available_node_types": None}) is None
    kinds["own"] = {"resources": {}}
    assert parsed({"head_node_type": "head", "available_node_types": kinds}) is None


def test_what_ones_own_machines_have_is_not_known():
    """Ray knows one type of them, which the head is of too."""
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(yaml.safe_load((CLUSTER / "onprem.yaml").read_text()))
    assert parsed(prepared) is None


def test_a_configuration_that_cannot_be_read_is_no_mistake(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "a", "Resources": {nodes.ON_HEAD: 1.0}}])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    for wrong in (None, {"available_node_types": {"cpu": {"resources": {"CPU": 1}, "max_workers": None}}}):
        monkeypatch.setattr(nodes, "_read_configuration", lambda wrong=wrong: parsed(wrong))
        assert nodes.growth() is None


amount = st.integers(0, 64)


@given(st.lists(st.fixed_dictionaries({"CPU": amount, "GPU": amount})), st.integers(1, 8), st.integers(0, 8))
def test_what_fits_is_what_can_be_taken_one_by_one(there, cpus, gpus):
    bundle = {"CPU": cpus, "GPU": gpus}
    taken = 0
    for node in there:
        left = dict(node)
        while all(left[name] >= needed for name, needed in bundle.items()):
            left = {name: left[name] - needed for name, needed in bundle.items()}
            taken += 1
    assert fit(there, bundle) == taken


def test_parts_of_a_gpu():
    assert bundles_in({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.1}) == 8
    assert bundles_in({"CPU": 16, "GPU": 1}, {"CPU": 1, "GPU": 0.1}) == 10


def test_what_needs_nothing_fits_as_often_as_one_likes():
    for nothing in ({}, {"CPU": 0, "GPU": 0}):
        assert bundles_in(CPU, nothing) == bundles_in({}, nothing) == sys.maxsize
    assert growth_of("local.yaml").bundles({}) >= sys.maxsize and fit([], {}) == 0


def test_words():
    assert amounts({"CPU": 4.0, "GPU": 0.5, "memory": 1e9}) == "4 CPU, 0.5 GPU"
    assert amounts({"memory": 1e9}) == "no CPU"


@pytest.mark.parametrize(
    ("there", "left", "said"),
    [
        ([{}], [{}], "the cluster has room for 0 now; it has 1 node (no CPU) and may start 2 x cpu (1 CPU)"),
        (
            [{}, CPU],
            [{}, {}],
            "the cluster has room for 1 now; it has 2 nodes (1 CPU) and may start 2 x cpu (1 CPU)",
        ),
        ([CPU, CPU, CPU], [{}, CPU, {}], "the cluster has room for 3, others have taken 2"),
    ],
)
def test_what_one_waits_for(there, left, said, monkeypatch):
    monkeypatch.setattr(nodes, "living", lambda: there)
    monkeypatch.setattr(nodes, "free", lambda: left)
    assert waiting_for(CPU, 2, growth_of("local.yaml")) == f"waiting for 2 x (1 CPU): {said}"
    assert waiting_for(CPU, fit(left, CPU), growth_of("local.yaml")) is None


class Coordinator:
    def __init__(self):
        self.calls = []
        self.request_resources = self.cancel_request = self

    def remote(self, name=None, **given):
        self.calls.append(given.get("resources", name))


@pytest.fixture
def coordinator(monkeypatch):
    found = Coordinator()
    monkeypatch.setattr(nodes, "_coordinator", lambda create: found)
    monkeypatch.setattr("ray.wait", lambda *_, **__: None)
    return found


def test_a_request_is_passed_on_when_it_changes_and_renewed_and_given_back(coordinator, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: clock[0])
    request = Request("a")
    request.ask([])
    assert coordinator.calls == []  # nothing was wanted, so there is nothing to give back
    request.ask([CPU, CPU])
    request.ask([CPU, CPU])
    assert coordinator.calls == [[CPU, CPU]]
    clock[0] += nodes.RENEW_S
    request.ask([CPU, CPU])
    request.ask([CPU])
    assert coordinator.calls[1:] == [[CPU, CPU], [CPU]]
    request.ask([])
    request.close()
    assert coordinator.calls[3:] == ["a"]
    assert nodes.RENEW_S < nodes.REQUEST_S / 3  # two renewals may get lost
