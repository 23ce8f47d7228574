# SPDX-License-Identifier: Apache-2.0
"""`mesh check` before the first start: whether this node's packets reach the ports of mesh on the swarm's other nodes.

Where mesh runs, its agent or its programs answer. Where it does not, the kernel does, for a closed port: a reset (TCP)
or an ICMP error (UDP) shows that the packet has arrived as well as an answer would.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.cli.check.finding import Finding, Level
from mesh.cluster.keys import ring_of
from mesh.config.keys import Config
from mesh.datapath.kernel.preflight import preflight
from mesh.datapath.paths import peer_probe
from mesh.datapath.paths.peer_probe import NO_ANSWER, NOBODY, answered, ask_stream
from mesh.datapath.paths.tunnel_probe import NO_RIGHT, ask_tunnel_either_way
from mesh.model import Address, EngineKind

AT_ONCE: Final = 32  # nodes
WAIT: Final = 1.5  # seconds for a handshake: the kernel sends its first packet again after one
TRIES: Final = 3
AGAIN: Final = 0.4  # seconds for the answer to a datagram


@dataclass(frozen=True, slots=True)
class Other:
    """Another node, as Docker lists it."""

    name: str
    address: Address | None
    up: bool = True


@dataclass(frozen=True, slots=True)
class Port:
    """A port of mesh on other nodes, and what was found there: empty if it answers, else in words."""

    what: str
    protocol: str
    number: int
    found: str


def check_paths(config: Config, own: Address | None, others: Sequence[Other]) -> Iterator[Finding]:
    """One finding for each other node and port: open, blocked, or unknown.

    Args:
        own: this node's address in the swarm.
    """
    kernel = config.engine != EngineKind.PROXY and preflight(config) is None
    for findings in asyncio.run(_all(config, own if kernel else None, others)):
        yield from findings


async def _all(config: Config, own: Address | None, others: Sequence[Other]) -> list[list[Finding]]:
    free = asyncio.Semaphore(AT_ONCE)

    async def one(other: Other) -> list[Finding]:
        async with free:
            return await _one(config, own, other)

    return await asyncio.gather(*(one(other) for other in sorted(others, key=lambda other: other.name)))


async def _one(config: Config, own: Address | None, other: Other) -> list[Finding]:
    if other.address is None or not other.up:
        said = "Docker says that it is down" if other.address is not None else "Docker knows no address of it"
        return [Finding(f"{other.name} paths", Level.WARN, f"not tried: {said}", "check again once it is up")]
    address = other.address
    control, peer, udp, tunnel = await asyncio.gather(
        _connects(address, config.cluster_port),
        ask_stream(address, config.peer_port, WAIT, WAIT),
        asyncio.to_thread(_datagram, address, config.peer_port),
        _tunnel(config, address, own),
    )
    agent = not peer  # one answers there that takes this node for one of the swarm
    ports = [
        Port("control port", "tcp", config.cluster_port, control),
        Port("peer port", "tcp", config.peer_port, "" if peer == "cut off" else peer),
        Port("peer port", "udp", config.peer_port, udp),
    ]
    if own is not None and own.version == address.version:
        ports.append(Port("tunnel", "udp", config.tunnel_port, tunnel))
    return [finding(other, port, agent=agent) for port in ports]


async def _tunnel(config: Config, address: Address, own: Address | None) -> str:
    if own is None or own.version != address.version:
        return ""
    keys = ring_of(Path(config.state_dir))
    return await asyncio.to_thread(ask_tunnel_either_way, address, own, config.tunnel_port, keys)


async def _connects(address: Address, port: int) -> str:
    """Whether TCP connects; empty: it does, else why not, in the words of `ask_stream`."""
    try:
        async with asyncio.timeout(WAIT):
            _, writer = await asyncio.open_connection(str(address), port)
        writer.close()
    except TimeoutError:
        return NO_ANSWER
    except ConnectionRefusedError:
        return NOBODY
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _datagram(address: Address, port: int) -> str:
    """Whether the peer port answers a datagram; likewise."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    nonce = os.urandom(16)
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(address), port))
            for _ in range(TRIES):
                sock.send(peer_probe.question(nonce))
                if answered(sock, AGAIN, lambda data: peer_probe.nonce_of(data, 16) == nonce):
                    return ""
        except ConnectionRefusedError:
            return NOBODY
        except OSError as error:
            return error.strerror or str(error)
    return NO_ANSWER


def finding(other: Other, port: Port, *, agent: bool) -> Finding:
    """What was found at a port of another node. Pure.

    Args:
        agent: mesh runs there and knows this node, so that it would have answered.
    """
    what, place = f"{other.name} {port.what} {port.protocol}", f"{other.address} {port.protocol} {port.number}"
    through = f"let {port.protocol.upper()} {port.number} through between all nodes, both ways"
    if not port.found:
        return Finding(what, Level.OK, f"{place}: open, mesh answers")
    if port.found == NOBODY:
        return Finding(what, Level.OK, f"{place}: open, nobody listens there yet")
    if port.found == NO_RIGHT:
        return Finding(what, Level.WARN, f"{place}: unknown, without the right to see packets", "run this as root")
    if port.found == NO_ANSWER and port.protocol == "udp" and not agent:
        found = f"{place}: unknown, neither mesh nor the kernel there answers"
        return Finding(what, Level.WARN, found, f"{through}; start mesh there, and check again")
    if port.found == NO_ANSWER:
        return Finding(what, Level.FAIL, f"{place}: blocked, no answer", f"{through}; is the node up?")
    return Finding(what, Level.FAIL, f"{place}: blocked, {port.found.lower()}", f"{through}; is there a route to it?")


def summed(findings: Iterable[Finding]) -> str:
    """How many findings there are of each level: the last line of `mesh check`."""
    levels = [finding.level for finding in findings]
    counts = ((Level.OK, "ok"), (Level.WARN, "warning"), (Level.FAIL, "error"))
    return ", ".join(
        f"{levels.count(level)} {word}" + ("s" if level is not Level.OK and levels.count(level) != 1 else "")
        for level, word in counts
    )
