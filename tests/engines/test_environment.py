# SPDX-License-Identifier: Apache-2.0
"""Unequal MTUs, IPv6 backends, PROXY protocol before a real peer, the static file's edits, source rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from tests.engines.topology import STREAM, STREAM_PORT, WEB, Spec, Topology
from tests.support import peers
from tests.support.peers import Stream
from tests.support.polling import wait_for

pytestmark = pytest.mark.root

NGINX = """
daemon off; master_process off; pid {directory}/nginx.pid; error_log stderr;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  server {{
    listen 8090 {listen};
    location / {{ return 200 '{{"task": "{of}"}}'; }}
  }}
}}
"""
NGINX_SEES = {
    "proxy_protocol": "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port",
    "": "$remote_addr $remote_port",
}
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend web
  bind :8090 {accept}
  http-request return status 200 content-type application/json lf-string '{{"task": "%[src] %[src_port]"}}'
"""


@pytest.mark.parametrize(("client_mtu", "mtu"), [(1280, 1500), (1500, 1280), (1500, 9000)])
def test_mtu(make_topology: Callable[..., Topology], client_mtu: int, mtu: int) -> None:
    topology = make_topology(backends=2, mtu=mtu, client_mtu=client_mtu)
    topology.serve()
    for address in (topology.node.address, topology.node.address6):
        stream = Stream(topology.client, address, STREAM, "mtu", "-u", "10000000", "-d", "10000000")
        assert stream.wait()["end"] == "complete"
        report = peers.load(topology.client, address, WEB, "-n", "50", "-c", "8", "-u", "/bytes?n=100000")
        assert report.ok == 50


def test_ipv6_backends(topology: Topology) -> None:
    spec = Spec("stream", (f"{STREAM}:{STREAM_PORT}/tcp",), tuple(topology.hosts), family=6)
    topology.change(spec)
    stream = Stream(topology.client, topology.node.address6, STREAM, "six", "-u", "1000000", "-d", "1000000")
    assert stream.wait()["end"] == "complete"


def run_nginx(topology: Topology, listen: str) -> list[str]:
    directory = topology.lab.directory
    (directory / "nginx.conf").write_text(NGINX.format(directory=directory, listen=listen, of=NGINX_SEES[listen]))
    return ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")]


def run_haproxy(topology: Topology, listen: str) -> list[str]:
    config = topology.lab.directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(accept="accept-proxy" if listen else ""))
    return ["haproxy", "-db", "-f", str(config)]


@pytest.mark.parametrize("run", [run_nginx, run_haproxy], ids=["nginx", "haproxy"])
@pytest.mark.parametrize(
    "listen",
    [
        pytest.param("proxy_protocol", id="by PROXY protocol"),
        pytest.param("", id="by the packet", marks=pytest.mark.only("kernel")),  # else the proxy's address is there
    ],
)
def test_a_reverse_proxy_sees_the_client(
    topology: Topology, run: Callable[[Topology, str], list[str]], listen: str
) -> None:
    """The recipes of docs/RECIPES.md, with the real programs."""
    ports = 28000 + 100 * (run is run_haproxy) + 200 * bool(listen)  # of the client: none of a test before
    command = run(topology, listen)
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    host = topology.hosts["b1"]
    with (topology.lab.directory / "reverse-proxy.log").open("w") as log:
        server = host.namespace.popen(*command, stdout=log, stderr=log)
    options = {"health": "tcp", "health-interval": "100ms"} | ({"proxy-protocol": "v2"} if listen else {})
    calls = [(topology.client.address, topology.node.address)]
    if listen:  # a task without IPv6 is called by the fallback proxy: only a header tells it the client
        calls.append((topology.client.address6, topology.node.address6))
    try:
        wait_for(lambda: topology.listens(host.namespace, 8090), command[0])
        topology.change(Spec("proxied", ("8010:8090/tcp",), ("b1",), options=options))
        for source, node in calls:
            report = peers.load(
                topology.client, node, 8010, "-n", "30", "-c", "4", "-p", str(ports), "-b", source, "-v"
            )
            assert report.ok == 30
            for port, seen in report.seen:
                assert seen.split()[:2] == [source, str(port)]
    finally:
        server.terminate()
        server.wait()


def test_broken_edit_keeps_the_last_good_state(topology: Topology) -> None:
    address, good = topology.node.address, topology.static_file.read_text()
    for broken in (
        "[[service]\n",
        good.replace('"172.31.0.12"', '"172.31.0.1222"'),
        good.replace("[[services", "[[servces"),
    ):
        topology.static_file.write_text(broken)
        shown = wait_for(lambda: topology.daemon.state()["provider"]["error"], "the error is shown")
        assert "mesh-static.toml" in shown
        report = peers.load(topology.client, address, WEB, "-n", "200", "-c", "8")
        assert (report.ok, len(report.identities)) == (200, 4)
        topology.write(topology.default())
        wait_for(lambda: not topology.daemon.state()["provider"]["error"], "the error is gone")


def test_reload_on_edit(topology: Topology) -> None:
    topology.change(*topology.default("b1", "b3"))
    report = peers.load(topology.client, topology.node.address, WEB, "-n", "200", "-c", "8")
    assert set(report.identities) == {"b1", "b3"}
    topology.change(*topology.default())
    assert len(peers.load(topology.client, topology.node.address, WEB, "-n", "200", "-c", "8").identities) == 4


def test_denied_clients(topology: Topology) -> None:
    web, *others = topology.default()
    web.options["deny"] = "192.0.2.77/32, 2001:db8::77/128"
    topology.change(web, *others)
    topology.client.add_address("eth0", "192.0.2.77/24", "2001:db8::77/64")
    for source, node in (("192.0.2.77", topology.node.address), ("2001:db8::77", topology.node.address6)):
        denied = peers.load(topology.client, node, WEB, "-n", "5", "-c", "5", "-T", "2", "-b", source)
        assert denied.ok == 0
    assert peers.load(topology.client, topology.node.address, WEB, "-n", "5", "-b", topology.client.address).ok == 5


def test_explain_tells_what_happens(topology: Topology) -> None:
    """`mesh explain` names the backend that answers."""
    source, node = topology.client.address, topology.node.address
    report = peers.load(topology.client, node, WEB, "-n", "5", "-c", "1", "-p", "29000", "-v")
    for port, name in report.seen:
        status, body = topology.daemon.get(f"/explain?source={source}:{port}&destination={node}:{WEB}&protocol=tcp")
        assert status == 200, body
        assert name in json.dumps(json.loads(body)["backend"])
