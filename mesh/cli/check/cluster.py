# SPDX-License-Identifier: Apache-2.0
"""`mesh check --cluster`: the paths from this node to every other one."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mesh import __version__
from mesh.cli.check.finding import Finding, Level
from mesh.cli.client import call
from mesh.cluster.credentials import CredentialsError, Files, load
from mesh.cluster.keys import ring_of
from mesh.config.keys import Config
from mesh.datapath.netlink import Netlink
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY, PathMtu, ask_stream, path_mtu
from mesh.datapath.paths.tunnel_probe import NO_RIGHT, ask_tunnel_either_way
from mesh.errors import MeshError
from mesh.model import Address, EngineKind

TIMEOUT: Final = 3.0  # seconds for a handshake and an answer
EXPIRY_WARN: Final = 0.2  # share of a certificate's life: swarm renews it long before
AT_ONCE: Final = 32
_MTU_UNKNOWN: Final = 1500
CLOCK: Final = (
    "may be 30 s off that of other nodes: managers name nodes whose clock is further off (proofs between nodes)"
)


Findings = Iterator[Finding]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node, as this one's daemon knows it."""

    id: str
    name: str
    address: Address | None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Own:
    """This node, as its daemon says."""

    address: Address | None
    engine: str


@dataclass(slots=True)
class Answer:
    """What another node's control port said."""

    obstacle: str = ""
    remedy: str = ""
    seconds: float = 0.0
    valid: tuple[datetime, datetime] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def check_cluster(config: Config) -> Findings:
    """Findings about this node's certificate, then about each other node, node by node."""
    try:
        known, state = call(Path(config.state_dir), "/nodes"), call(Path(config.state_dir), "/state")
    except MeshError as error:
        yield Finding("nodes", Level.FAIL, str(MeshError(error.message, where=error.where)), error.remedy)
        return
    own = next((node for node in known["nodes"] if node["id"] == known["node"]), None)
    others = [
        Peer(n["id"], n["name"], _address(n["address"]), n["engine"])
        for n in known["nodes"]
        if n["id"] != known["node"]
    ]
    if own is None and state["provider"]["kind"] not in ("swarm", "relay"):
        found = "this daemon does not serve a swarm"
        yield Finding("nodes", Level.FAIL, found, "provider = swarm, on a node of a swarm")
        return
    if own is None:
        found = "this node is not among those it knows" if known["nodes"] else "it has not been told of any node yet"
        yield Finding("nodes", Level.FAIL, found, "`mesh status` says what it waits for")
    else:
        found = f"this is {own['name']} at {own['address'] or 'no known address'}, with {len(others)} others"
        yield Finding("nodes", Level.OK, found)
    try:
        credentials = load(Files.of(config))
    except CredentialsError as error:
        yield Finding("own certificate", Level.FAIL, f"{error.where}: {error.message}", error.remedy)
        return
    yield expiry("own certificate", credentials.begins, credentials.expires, credentials.identity.role)
    yield Finding("clock", Level.OK, CLOCK)
    if own is None:
        return
    here = Own(_address(own["address"]), state["engine"])
    for findings in asyncio.run(_all(config, here, others, credentials.client)):
        yield from findings


def _address(text: str) -> Address | None:
    return ipaddress.ip_address(text) if text else None


async def _all(config: Config, own: Own, others: list[Peer], context: ssl.SSLContext) -> list[list[Finding]]:
    free = asyncio.Semaphore(AT_ONCE)
    mtus = device_mtus(peer.address for peer in others if peer.address is not None)

    async def one(peer: Peer) -> list[Finding]:
        async with free:
            return await _one(config, own, peer, mtus, context)

    return await asyncio.gather(*(one(peer) for peer in sorted(others, key=lambda peer: peer.name)))


async def _one(
    config: Config, own: Own, peer: Peer, device_mtu: Mapping[Address, int], context: ssl.SSLContext
) -> list[Finding]:
    if peer.address is None:
        remedy = "docker node inspect; join with --advertise-addr"
        return [Finding(f"{peer.name} address", Level.FAIL, "no address of it is known", remedy)]
    answer, refusal, mtu = await asyncio.gather(
        ask_control(peer, config.cluster_port, context),
        ask_stream(peer.address, config.peer_port),
        asyncio.to_thread(path_mtu, peer.address, config.peer_port, device_mtu[peer.address]),
    )
    if answer.obstacle == NO_ANSWER and mtu.black_hole:
        answer.remedy = "first the path MTU: packets of the handshake may be too large"
    findings = [*control(peer, config.cluster_port, answer), *peer_port(peer, config.peer_port, refusal, mtu)]
    if own.engine == (answer.about.get("engine") or peer.engine) == EngineKind.KERNEL and own.address is not None:
        keys = ring_of(Path(config.state_dir))
        obstacle = await asyncio.to_thread(ask_tunnel_either_way, peer.address, own.address, config.tunnel_port, keys)
        findings.append(tunnel(peer, config.tunnel_port, obstacle))
    return findings


async def ask_control(peer: Peer, port: int, context: ssl.SSLContext) -> Answer:
    """One question over mutual TLS. The node's id is a name in its certificate: nobody else answers for it."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(
                str(peer.address), port, ssl=context, server_hostname=peer.id
            )
            certificate = writer.get_extra_info("peercert") or {}
            writer.write(f"GET /v1/node HTTP/1.1\r\nHost: {peer.id}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
    except TimeoutError:
        return Answer(NO_ANSWER, f"let TCP {port} of all nodes through the firewall; is the node up?")
    except ConnectionRefusedError:
        return Answer(NOBODY, "start mesh there, with the same cluster_port")
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        return Answer(f"no TLS: {reason}", "does another program hold the port? is the node of this swarm? its clock?")
    except OSError as error:
        return Answer(error.strerror or str(error), "is the node up, and is there a route to it?")
    answer = Answer(
        seconds=time.monotonic() - begun, valid=(_time(certificate, "notBefore"), _time(certificate, "notAfter"))
    )
    status = head.split(b" ", 2)[1:2]
    if status == [b"200"]:
        answer.about = json.loads(body)
    elif status != [b"404"]:
        answer.obstacle = f"refused: {body.decode(errors='replace').strip() or head.decode(errors='replace')[:80]}"
        answer.remedy = "are both nodes of the same swarm? `mesh status` there says more"
    return answer


def _time(certificate: Mapping[str, Any], key: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate[key])), UTC)


def control(peer: Peer, port: int, answer: Answer) -> Findings:
    """The control port, the certificate behind it, and who answered."""
    what = f"{peer.name} control port"
    if answer.obstacle:
        yield Finding(what, Level.FAIL, f"{peer.address} tcp {port}: {answer.obstacle}", answer.remedy)
    else:
        yield Finding(what, Level.OK, f"{peer.address} tcp {port}: mutual TLS, {answer.seconds * 1000:.0f} ms")
    if answer.valid is not None:
        yield expiry(f"{peer.name} certificate", *answer.valid, str(answer.about.get("role", "")))
    if answer.valid is None or answer.obstacle:
        return
    version, engine = answer.about.get("mesh"), answer.about.get("engine")
    found = f"{version}, engine {engine or 'unknown'}" if version else "an older version, which does not report itself"
    same = version == __version__
    remedy = "" if same else f"this is {__version__}; versions one apart work together, upgrade the older one"
    yield Finding(f"{peer.name} mesh", Level.OK if same else Level.WARN, found, remedy)


def expiry(what: str, begins: datetime, expires: datetime, role: str) -> Finding:
    """How long a certificate is good; swarm renews node certificates in the second half of their life."""
    now = datetime.now(UTC)
    left, life = (expires - now).total_seconds(), (expires - begins).total_seconds()
    found = f"{role + ', ' if role else ''}valid until {expires:%Y-%m-%d %H:%M} UTC"
    remedy = "swarm should have renewed it: is dockerd there in reach of a manager (TCP 2377)? docker swarm ca --rotate"
    if left <= 0:
        return Finding(what, Level.FAIL, f"{found}: expired", remedy)
    if left < EXPIRY_WARN * life:
        return Finding(what, Level.WARN, f"{found}: {left / 86400:.1f} days left", remedy)
    return Finding(what, Level.OK, found)


def peer_port(peer: Peer, port: int, refusal: str, mtu: PathMtu) -> Findings:
    """The port at which flows are handed over, by TCP and UDP, and the size of packets on the way."""
    remedies = {
        NO_ANSWER: f"let {{}} {port} of all nodes through the firewall; is the node up?",
        NOBODY: "is mesh running there, with the same peer_port? `mesh status` there says more",
        "cut off": "this node calls it from an address that is not its own in the swarm: join with --advertise-addr",
    }

    def finding(protocol: str, obstacle: str) -> Finding:
        what, found = f"{peer.name} peer port {protocol}", f"{peer.address} {protocol} {port}"
        if not obstacle:
            return Finding(what, Level.OK, f"{found}: answers")
        remedy = remedies.get(obstacle, "is the node up, and is there a route to it?")
        return Finding(what, Level.FAIL, f"{found}: {obstacle}", remedy.format(protocol.upper()))

    yield finding("tcp", refusal)
    yield finding("udp", mtu.obstacle)
    what = f"{peer.name} path MTU"
    if not mtu.mtu:
        yield Finding(what, Level.WARN, "not known without an answer by UDP", "first the peer port")
    elif mtu.black_hole:
        found = f"{mtu.mtu} bytes; larger packets vanish and no router tells, this interface sends {mtu.device}"
        remedy = f"set the MTU of the interfaces between the nodes to {mtu.mtu}, or let ICMP too-big messages through"
        yield Finding(what, Level.FAIL, found, remedy)
    elif mtu.mtu < mtu.device:
        yield Finding(what, Level.OK, f"{mtu.mtu} bytes of {mtu.device} on this interface; senders are told (ICMP)")
    else:
        yield Finding(what, Level.OK, f"{mtu.mtu} bytes")


def tunnel(peer: Peer, port: int, obstacle: str) -> Finding:
    """The tunnel between two kernel engines, there and back."""
    what, found = f"{peer.name} tunnel", f"{peer.address} udp {port}"
    if not obstacle:
        return Finding(what, Level.OK, f"{found}: answers")
    if obstacle == NO_RIGHT:
        return Finding(what, Level.WARN, f"{found}: not tried, without the right to see packets", "run this as root")
    if obstacle == NOBODY:
        remedy = "is mesh running there with the kernel engine and the same tunnel_port? `mesh status` there says more"
    else:
        remedy = (
            f"let UDP {port} of all nodes through, both ways; mesh_verdicts_total there: tunnel_foreign grows if it "
            "takes this node for none of the swarm's, tunnel_no_backend if only answers are lost"
        )
    return Finding(what, Level.FAIL, f"{found}: {obstacle}", remedy)


def device_mtus(addresses: Iterable[Address]) -> dict[Address, int]:
    """MTU of the interface that leads to each address, bytes."""
    with closing(Netlink()) as netlink:
        interfaces = netlink.topology().interfaces
        routes = {address: netlink.route(address) for address in addresses}
    return {
        address: interfaces[route.interface].mtu if route and route.interface in interfaces else _MTU_UNKNOWN
        for address, route in routes.items()
    }
