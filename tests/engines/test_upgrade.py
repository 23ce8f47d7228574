# SPDX-License-Identifier: Apache-2.0
"""From the build before the contract last changed to this one (kernel engine). The old one is built from git."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.topology import WEB, Topology
from tests.support import peers
from tests.support.old_build import old_build
from tests.support.polling import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.only("kernel"), pytest.mark.later("kernel")]


@pytest.fixture(scope="module")
def old() -> Path:
    return old_build()


@pytest.mark.parametrize("how", ["take over", "restart", "kill"])
def test_connections_go_on_through_an_upgrade(old: Path, make_topology: Callable[..., Topology], how: str) -> None:
    """Those that are open, busy or silent, and new ones."""
    topology = make_topology()
    topology.program = old
    daemon = topology.serve()
    before, address = daemon.process, topology.node.address
    assert daemon.state()["engine"] == topology.engine
    with (
        peers.Load(topology.client, address, WEB, "-c", "100", "-k", "100") as busy,
        peers.Load(topology.client, address, WEB, "-c", "100", "-k", "3600000") as silent,
        peers.Load(topology.client, address, WEB, "-n", "0", "-c", "8", "-r", "200") as fresh,
    ):
        busy.wait_ready()
        silent.wait_ready()
        fresh.wait_more()
        daemon.program = Path(sys.executable).with_name("mesh")
        if how == "take over":
            daemon.start("--take-over")
            before.wait(PATIENCE)
        else:
            daemon.stop() if how == "restart" else daemon.kill()
            daemon.start()
        new = daemon.state()
        assert new["pid"] == daemon.process.pid != before.pid and new["problems"] == []
        fresh.wait_more(1000)
        busy.wait_more(1000)
        reports = [load.stop() for load in (busy, silent, fresh)]
    assert [report.failures for report in reports] == [(), (), ()]
    assert reports[0].ok == reports[1].ok == 100
    wait_for(lambda: peers.load(topology.client, address, WEB, "-n", "200", "-c", "8").ok == 200, "all is served")
    assert len(list(topology.bpf_fs().glob("mesh/*/*/mesh_config"))) == 1, "the old build's pins are gone"
