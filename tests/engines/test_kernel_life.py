# SPDX-License-Identifier: Apache-2.0
"""The kernel engine as agents come and go: adoption, take-over, hand-back, what it needs and what it leaves."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from mesh import _bpf
from mesh.datapath.kernel.maps import CARRIED
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import PORT, Connection, Plane, refused, serve
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def engine(serving: Driver) -> Driver:
    """Not the suite's, which is a name."""
    return serving


def test_traffic_outlives_the_agent_and_the_next_one_adopts(plane: Plane, engine: Driver) -> None:
    ids = engine.serve(services=[plane.web("b1", "b2")])["ids"]
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    opened = wait_for(lambda: engine.stats()["frontends"]["*:8000/tcp"]["opened"], "counted")
    engine.kill()
    assert set(plane.calls(30)) == {"b1", "b2"}
    for connection in connections:
        connection.echo()
    second = plane.driver()
    adopted = second.open()
    assert adopted["frontends"] == {"*:8000/tcp": "web"}
    assert {name: ids[name] for name in adopted["backends"]} == adopted["backends"]
    assert second.stats()["frontends"]["*:8000/tcp"]["opened"] >= opened + 30
    second.serve(services=[plane.web("b1", "b2", "b3")])
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo()
    second.close(release=True)


def test_the_next_process_takes_over_from_a_running_one(plane: Plane, engine: Driver) -> None:
    """Maps have one writer: the first process no longer follows the network once the second has opened."""
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    second = plane.driver()
    assert second.open()["frontends"] == {"*:8000/tcp": "web"}
    second.serve(services=[plane.web("b1", "b2", "b3", weights={"b1": 0})])
    plane.add("b4", 4)
    second.serve(services=[plane.web("b1", "b2", "b3", "b4", weights={"b1": 0})])
    assert set(plane.calls(60)) == {"b2", "b3", "b4"}
    for connection in connections:
        connection.echo()
    engine.close(release=False)
    engine.end()
    assert set(plane.calls(60)) == {"b2", "b3", "b4"}
    second.close(release=True)


def test_adoption_without_the_names_file(plane: Plane, engine: Driver) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    engine.kill()
    (plane.state / "kernel-names.json").unlink()
    second = plane.driver()
    assert set(second.open()["frontends"]) == {"*:8000/tcp"}
    assert sum(plane.calls(10).values()) == 10
    second.serve(services=[plane.web("b1", "b2", "b3")])
    for connection in connections:
        connection.echo()
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    second.close(release=True)


def shorten(pins: Path) -> None:
    """Make reverse NAT what it was in 0.1: a shorter struct, and UDP flows among the others."""
    rows = list(_bpf.Map.open(str(pins / "mesh_revnat")).rows())
    udp = rows[0][0][:36] + b"\x11" + rows[0][0][37:]
    made = _bpf.Map.create(9, "mesh_revnat", 40, 56, 4096)  # BPF_MAP_TYPE_LRU_HASH
    for key, value in [*rows, (udp, rows[0][1])]:
        made.update(key, value[:56])
    for name in ("mesh_revnat", "mesh_revnat_udp"):
        (pins / name).unlink()
    made.pin(str(pins / "mesh_revnat"))


@pytest.mark.parametrize("old_build", ["same version", "former names", "shorter struct", "other version"])
def test_another_contract_is_built_beside_and_the_old_one_removed(plane: Plane, engine: Driver, old_build: str) -> None:
    connections = [Connection(plane.client, plane.node.address) for _ in range(20)]
    for connection in connections:
        connection.echo()
    engine.kill()
    (home,) = (plane.bpffs / "mesh").iterdir()
    (old,) = home.iterdir()
    version = old.name.partition("-")[0] if old_build != "other version" else "0"
    if old_build == "former names":
        for name, former in CARRIED.items():
            (old / name).rename(old / former)
    if old_build == "shorter struct":
        shorten(old)
    old.rename(home / f"{version}-0123456789abcdef")  # stands for a build with other headers
    second = plane.driver()
    assert second.open()["frontends"] == {"*:8000/tcp": "web"}
    assert second.entries()["revnat"] == (0 if old_build == "other version" else len(connections))
    assert second.entries()["revnat_udp"] == (old_build == "shorter struct")
    assert [p.name for p in home.iterdir()] == [old.name]
    second.serve(services=[plane.web("b1", "b2", "b3")])
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    for connection in connections:
        connection.echo()
    second.close(release=True)


def test_take_over_and_hand_back_cut_nothing(plane: Plane) -> None:
    serve(plane.node, "before", PORT)  # something on the node serves the port already
    old = [Connection(plane.client, plane.node.address) for _ in range(20)]
    engine = plane.driver()
    engine.open()
    engine.serve(services=[plane.web("b1", "b2", "b3")])
    assert "before" not in plane.calls(40)
    for connection in old:
        connection.echo()
    ours = [Connection(plane.client, plane.node.address) for _ in range(20)]
    closing = threading.Thread(target=lambda: engine.close(release=True))
    closing.start()
    wait_for(lambda: set(plane.calls(5)) == {"before"}, "handed back")
    for connection in old + ours:
        connection.echo()
    for connection in ours:
        connection.close()
    closing.join()


def test_an_open_that_fails_leaves_no_thread_and_can_be_repeated(plane: Plane) -> None:
    engine = plane.driver()
    before = engine.threads()
    engine.fail_once()
    with pytest.raises(RuntimeError, match="the network cannot be read"):
        engine.open()
    assert engine.threads() == before
    with pytest.raises(RuntimeError, match="not open"):
        engine.problems()
    engine.open()
    engine.serve(services=[plane.web("b1", "b2")])
    assert set(plane.calls(30)) == {"b1", "b2"}
    engine.close(release=True)
    assert engine.threads() == before


def test_hand_back_leaves_nothing(plane: Plane, engine: Driver) -> None:
    plane.calls(20)
    assert plane.pins()
    engine.close(release=True)
    engine.end()
    assert plane.pins() == []
    assert not list((plane.bpffs / "mesh").iterdir())
    with pytest.raises(ConnectionRefusedError):
        Connection(plane.client, plane.node.address)


def test_flows_under_way_keep_the_programs_after_hand_back(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    connection.echo()
    engine.close(release=True)
    engine.end()
    connection.echo()
    assert plane.pins()
    with pytest.raises(ConnectionRefusedError):
        Connection(plane.client, plane.node.address)
    second = plane.driver()
    second.open()
    second.serve(services=[plane.web("b1", "b2", "b3")])  # as before: they were handed back all the same
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    connection.echo()
    connection.close()
    second.close(release=True)
    second.end()


def test_xdp_stage_is_adopted_and_goes_with_the_engine(plane: Plane) -> None:
    """It drops before mesh_ingress can, in the next process as well; without the key it is taken off."""
    # In namespaces there are veths only, which lose the mark of checksums left to offload: have them complete.
    plane.client.run("ethtool", "-K", "eth0", "tx", "off")

    def is_on() -> bool:
        return "prog/xdp" in plane.node.run("ip", "-d", "link", "show", "eth0").stdout

    for end in ("kill", "off", "release"):
        driver = plane.driver(xdp="off" if end == "off" else "on", bpf_stats=1)
        driver.pretend_cards()
        driver.open()
        driver.serve(services=[plane.web("b1", options={"deny": ["192.0.2.0/24"]})])
        assert driver.problems() == []
        assert is_on() is (end != "off")
        denied = driver.stats()["verdicts"]["denied"]
        assert refused(plane.client, plane.node.address)
        stats = driver.stats()
        assert stats["verdicts"]["denied"] > denied
        assert ("program_xdp_runs" in stats["totals"]) is (end != "off")
        driver.serve(services=[plane.web("b1")])
        plane.calls(5)
        if end == "release":
            driver.close(release=True)
            assert not is_on()
            assert plane.pins() == []
        else:
            driver.kill()
            assert is_on() is (end != "off")


def test_no_more_than_three_capabilities(plane: Plane) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and a bpf file system that the user may write to; no root."""
    if not shutil.which("setpriv"):
        pytest.skip("setpriv (util-linux) drops the capabilities")
    for directory in (plane.bpffs, plane.lab.directory):
        directory.chmod(0o777)
    caps = "-all,+net_admin,+cap_38,+cap_39"
    user = ("--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    driver = plane.driver(("setpriv", *user, f"--bounding-set={caps}"))
    assert driver.preflight() is None
    driver.open()
    driver.serve(services=[plane.web("b1", "b2", "b3")])
    assert driver.problems() == []
    assert set(plane.calls(60)) == {"b1", "b2", "b3"}
    assert sum(plane.calls(5, plane.node, "127.0.0.1").values()) == 5
    driver.close(release=True)
    assert plane.pins() == []


def test_kernels_before_6_6_get_a_clsact_filter(plane: Plane) -> None:
    """Attached, adopted, replaced by tcx only when it is gone, and taken off."""
    first = plane.driver()
    first.pretend_kernel(major=6, minor=1)
    assert first.preflight() is None
    first.open()
    first.serve(services=[plane.web("b1", "b2", "b3")])
    assert first.problems() == []
    shown = plane.node.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    assert "mesh_ingress" in shown
    connections = [Connection(plane.client, plane.node.address) for _ in range(10)]
    first.kill()
    second = plane.driver()
    second.open()
    second.serve(services=[plane.web("b1", "b2")])
    assert set(plane.calls(30)) == {"b1", "b2"}
    for connection in connections:
        if connection.backend != "b3":
            connection.echo()
        connection.close()
    second.close(release=True)
    for device in ("eth0", "veth1", "lo"):
        assert "mesh" not in plane.node.run("tc", "filter", "show", "dev", device, "ingress", check=False).stdout


def test_preflight_says_why_not(plane: Plane) -> None:
    driver = plane.driver(("setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"))
    assert "CAP_NET_ADMIN" in driver.preflight()
    driver = plane.driver(("prlimit", "--nofile=24"))
    assert "EMFILE (Too many open files) (raise LimitNOFILE= or ulimit -Hn)" in driver.preflight()
    read_only = 'mount -o remount,bind,ro "$0" && exec "$@"'
    driver = plane.driver(("unshare", "--mount", "sh", "-c", read_only, str(plane.bpffs)))
    assert f"{plane.bpffs}: the bpf file system there cannot be written to" in driver.preflight()


def test_stop_without_release_leaves_everything(plane: Plane, engine: Driver) -> None:
    connection = Connection(plane.client, plane.node.address)
    engine.close(release=False)
    engine.end()
    connection.echo()
    assert sum(plane.calls(10).values()) == 10
