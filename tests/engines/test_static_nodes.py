# SPDX-License-Identifier: Apache-2.0
"""Two nodes that share a static file, with all backends on one: its clients and those of the other are served."""

from __future__ import annotations

from collections.abc import Callable

from tests.engines.topology import WEB, Topology
from tests.support import peers
from tests.support.daemon import Daemon
from tests.support.lab.netns import run
from tests.support.polling import wait_for


def test_nodes_of_a_static_file_hand_connections_to_each_other(make_topology: Callable[..., Topology]) -> None:
    topology = make_topology(backends=2)
    lab, far, near = topology.lab, topology.node, topology.lab.host("near")
    near.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    nodes = "".join(f'[[nodes]]\nname = "{node.short}"\naddress = "{node.address}"\n' for node in (near, far))
    services = topology.text(topology.default()).replace(
        "[[services.backends]]", '[[services.backends]]\nnode = "node"'
    )
    topology.static_file.write_text(services + nodes)
    daemons = {}
    for node in (near, far):
        directory = lab.directory / f"mesh-{node.short}"
        config: dict[str, object] = {
            "provider": "static",
            "static_file": topology.static_file,
            "engine": topology.engine,
        }
        if topology.engine == "kernel":
            bpf = config["bpf_fs"] = lab.directory / f"bpf-{node.short}"
            bpf.mkdir()
            run("mount", "-t", "bpf", "bpf", str(bpf))
            lab.on_close(lambda bpf=bpf: run("umount", "-l", str(bpf)))  # type: ignore[misc]
        daemons[node.short] = Daemon(node, directory, wait=False, **config)  # type: ignore[arg-type]
        lab.on_close(daemons[node.short].close)
    for daemon in daemons.values():
        daemon.wait_ready()
    state = daemons["near"].state()
    assert state["node"]["id"] == "near" and daemons["node"].state()["node"]["id"] == "node"
    wait_for(lambda: daemons["near"].state()["traffic"]["verdict"] == "ok", "the path is proven")
    for node in (near, far):
        report = peers.load(topology.client, node.address, WEB, "-n", "100", "-c", "8")
        assert (report.ok, report.failures, set(report.identities)) == (100, (), {"b1", "b2"})
    paths = {row["path"]: row["state"] for row in daemons["near"].state()["paths"]}
    assert paths["tunnel" if topology.engine == "kernel" else "peer"] == "up"
    assert {row["node"] for row in daemons["near"].state()["paths"]} == {"node"}
