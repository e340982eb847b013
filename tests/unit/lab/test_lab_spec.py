"""Lab files: what they mean, and what they are refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import spec
from lab.errors import LabInvalid, LabNotFound
from lab.names import Names, lab_of_namespace

REPOSITORY = Path(__file__).resolve().parents[3]


def parse(text: str, base: Path = REPOSITORY) -> spec.LabSpec:
    return spec.parse(text, source="lab.yaml", base=base)


def test_the_example_is_the_scene() -> None:
    lab = spec.load(REPOSITORY / "examples" / "lab" / "star-wars.yaml")
    assert [w.name for w in lab.workloads] == ["deathstar-1", "deathstar-2", "tiefighter", "xwing"]
    assert lab.workloads[0].labels == ("k8s:org=empire", "k8s:class=deathstar")
    assert lab.workloads[0].group == "deathstar"
    assert lab.workloads[0].ports == (80,)
    assert {w.namespace for w in lab.workloads} == {"default"}
    assert [n.name for n in lab.nodes] == ["node1"]


def test_name_can_be_overridden_and_defaults_hold() -> None:
    lab = spec.parse("name: a\nworkloads: [{name: w}]", source="x", base=REPOSITORY, name="b")
    assert lab.name == "b"
    assert (lab.pool4, lab.pool6) == (spec.DEFAULT_POOL4, spec.DEFAULT_POOL6)
    assert lab.workloads[0].command == ()


def test_labels_as_a_list_keep_their_source_and_yaml_scalars_become_text() -> None:
    lab = parse(
        "name: a\nworkloads:\n- {name: x, labels: ['container:a=b', c=d]}\n"
        "- {name: y, labels: {v: 1, t: true}}"
    )
    assert lab.workloads[0].labels == ("container:a=b", "k8s:c=d")
    assert lab.workloads[1].labels == ("k8s:v=1", "k8s:t=true")


def test_command_is_split_like_a_shell_would() -> None:
    lab = parse("name: a\nworkloads: [{name: x, command: \"sh -c 'a b'\"}]")
    assert lab.workloads[0].command == ("sh", "-c", "a b")


def test_annotations() -> None:
    lab = parse(
        "name: a\nworkloads:\n"
        "- {name: x, annotations: {io.cilium.proxy-visibility: <Ingress/80/TCP/HTTP>}}"
    )
    assert lab.workloads[0].annotations == (
        ("io.cilium.proxy-visibility", "<Ingress/80/TCP/HTTP>"),
    )


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(LabNotFound, match="no lab file"):
        spec.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", "lab.yaml: a lab file is a mapping"),
        ("name: [", "lab.yaml:1:"),
        ("workloads: []", "lab.yaml: name: is missing"),
        ("name: A", "lab.yaml:1: name: must be lower case"),
        ("name: a.b", "name: must be lower case"),
        ("name: a\nnodes: []", "0 nodes: a lab has exactly one node for now"),
        ("name: a\nnodes: [{name: x}, {name: y}]", "2 nodes"),
        ("name: a\nnodes: [{name: log}]", "nodes[0].name: a node's name"),
        ("name: a\npools: {ipv4: 10.0.0.1/8}", "lab.yaml:2: pools.ipv4: "),
        ("name: a\npools: {ipv6: 10.0.0.0/8}", "pools.ipv6: "),
        ("name: a\nworkloads:\n- {name: x, replicas: 0}", "lab.yaml:3: workloads[0].replicas: "),
        ("name: a\nworkloads:\n- {name: X}", "workloads[0].name: must be lower case"),
        ("name: a\nworkloads:\n- {name: x, labels: ['=y']}", "workloads[0].labels"),
        ("name: a\nworkloads:\n- {name: x, ports: [0]}", "workloads[0].ports[0]: "),
        ("name: a\nworkloads:\n- {name: x, lables: {}}", "workloads[0].lables: unknown field"),
        ("name: a\nworkloads: [{name: x}, {name: x}]", "default/x is there twice"),
        ("name: a\nworkloads: [{name: x-1}, {name: x, replicas: 2}]", "default/x-1 is there twice"),
        ("name: a\nworkloads: [{name: x, node: n9}]", "no node 'n9'"),
        (
            "name: a\nworkloads:\n- name: x\n  annotations: {io.cilium.proxy-visibility: <80>}",
            "lab.yaml:4: workloads[0].annotations: '<80>' is not <Ingress",
        ),
        ("name: a\nworkloads: [{name: x, annotations: {a: b}}]", "a means nothing here"),
        ("name: a\npolicies: [absent.yaml]", "policies: no file"),
        ("name: a\nenforcement: maybe", "enforcement: "),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}", "lab.yaml: this is a Pod, not a lab"),
    ],
)
def test_faults_are_named_with_field_and_line(text: str, fault: str) -> None:
    with pytest.raises(LabInvalid) as caught:
        parse(text)
    assert fault in caught.value.message


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(LabInvalid) as caught:
        parse("name: A\nworkloads:\n- {name: X}\n- {name: y, replicas: 0}")
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize("lab", ["a", "a-node", "a-b", "node", "a-pod"])
def test_a_namespace_belongs_to_one_lab(lab: str) -> None:
    names = Names(lab)
    for name in (names.wire, names.world, names.node("node1"), names.pod("default", "x-1")):
        assert lab_of_namespace(name) == lab


@pytest.mark.parametrize("name", ["cil00042", "cil-", "cilt-12-x", "foo", "cil-a-b.c", "cil-a.b"])
def test_other_namespaces_belong_to_none(name: str) -> None:
    assert lab_of_namespace(name) is None
