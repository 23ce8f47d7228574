# SPDX-License-Identifier: Apache-2.0
"""A node becomes another one while its agent runs, and the swarm's root is exchanged: connections follow."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bench.scale_certificates import LIFE, name
from mesh.cluster import relay_client, wire
from mesh.cluster.credentials import CredentialsWatch, Files
from mesh.cluster.relay_client import RelayProvider
from mesh.cluster.relay_server import RelayServer
from mesh.providers.swarm.roots import trusted
from mesh.providers.swarm.watch import tls_context
from tests.support.polling import until
from tests.support.relay import Authority, calling, context_of, serving

PEM = serialization.Encoding.PEM
ISSUER = name("swarm-ca", "swarm-ca")

_numbers = itertools.count()


class Root:
    """A swarm's CA as swarmkit makes it: all have one name, and what they sign is told apart by key identifiers."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        self.certificate = self.sign_ca(self)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder(ISSUER, subject, key, x509.random_serial_number(), now - LIFE, now + LIFE)
        return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)

    def sign_ca(self, other: Root) -> bytes:
        """The certificate of a CA. As issuer and subject have one name, Go leaves out which key has signed it."""
        made = self._builder(ISSUER, other.key.public_key())
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        return made.sign(self.key, hashes.SHA256()).public_bytes(PEM)

    def node(self, directory: Path, node: str, role: str, roots: bytes, behind: bytes = b"") -> Files:
        """The files of a node whose certificate is this CA's.

        Args:
            behind: what follows in the file of the certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        made = self._builder(name(node, role), key.public_key()).add_extension(usage, critical=False)
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(role)]), critical=False)
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self.identifier), critical=False
        )
        place = directory / f"{node}-{next(_numbers)}"
        place.mkdir()
        (place / "swarm-root-ca.crt").write_bytes(roots)
        (place / "swarm-node.crt").write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(PEM) + behind)
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (place / "swarm-node.key").write_bytes(private)
        return Files(place / "swarm-root-ca.crt", place / "swarm-node.crt", place / "swarm-node.key")


async def is_let_in(manager: Files, node: str, caller: Files) -> bool:
    async with serving(manager, "m1", node) as server:
        with contextlib.suppress(aiohttp.ClientError):
            async with calling(server.port, context_of(caller)):
                return True
    return False


async def test_chains_of_a_pending_rotation_are_accepted(tmp_path: Path) -> None:
    """Nodes have renewed certificates, trust the former root until the last one has, and then the next one."""
    former, following, stranger = Root(), Root(), Root()
    crossed = former.sign_ca(following)

    def before(node: str, role: str = "swarm-worker") -> Files:
        return former.node(tmp_path, node, role, former.certificate)

    def renewed(node: str, role: str = "swarm-worker") -> Files:
        return following.node(tmp_path, node, role, former.certificate, crossed)

    def after(node: str, role: str = "swarm-worker") -> Files:
        return following.node(tmp_path, node, role, following.certificate, crossed)

    assert await is_let_in(before("m1", "swarm-manager"), "n1", before("n1"))
    assert await is_let_in(renewed("m1", "swarm-manager"), "n1", renewed("n1"))
    for one, other in ((renewed, after), (after, renewed), (after, after)):
        assert await is_let_in(one("m1", "swarm-manager"), "n1", other("n1"))
    forged = stranger.node(tmp_path, "n1", "swarm-worker", former.certificate, stranger.sign_ca(following))
    assert not await is_let_in(renewed("m1", "swarm-manager"), "n1", forged)
    # Whoever comes with a CA of their own behind their certificate is trusted by themselves only.
    lying = stranger.node(tmp_path, "m1", "swarm-manager", former.certificate, stranger.certificate)
    assert not await is_let_in(lying, "n1", renewed("n1"))
    assert not await is_let_in(renewed("m1", "swarm-manager"), "n1", lying)


def test_only_what_the_root_has_signed_is_trusted_beside_it(tmp_path: Path) -> None:
    former, following, stranger = Root(), Root(), Root()
    crossed = former.sign_ca(following)
    leaf = former.node(tmp_path, "n1", "swarm-worker", former.certificate).certificate.read_bytes()
    behind = b"".join((leaf, stranger.certificate, stranger.sign_ca(following), following.certificate, crossed))
    found = trusted(former.certificate, x509.load_pem_x509_certificates(behind))
    assert found.encode() == former.certificate + crossed
    with pytest.raises(ValueError, match="PEM"):
        trusted(b"garbage", [])


async def test_the_watch_accepts_them_too(tmp_path: Path) -> None:
    """A manager's own Engine answers with such a chain on its control socket."""
    former, following = Root(), Root()
    files = following.node(tmp_path, "m1", "swarm-manager", former.certificate, former.sign_ca(following))
    context = tls_context(files.key.parent)
    async with serving(files, "m1") as server:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=context, server_hostname="swarm-manager"
        )
        writer.close()


@contextlib.asynccontextmanager
async def told_by(server: RelayServer, files: Files) -> AsyncIterator[RelayProvider]:
    """An agent that is connected to a manager."""

    async def managers() -> list[tuple[str, int]]:
        return [("127.0.0.1", server.port)]

    agent = RelayProvider(CredentialsWatch(files), managers)
    task = asyncio.create_task(agent.run(lambda inventory: None))
    try:
        await until(lambda: agent.status().connected, "it is connected")
        yield agent
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def become(files: Files, other: Files) -> None:
    """As `docker swarm leave` and `join` do: other files in the place of these, one after the other."""
    for old, new in ((files.key, other.key), (files.certificate, other.certificate), (files.ca, other.ca)):
        old.unlink()
        shutil.copy(new, old)


async def test_a_node_that_has_joined_anew_calls_by_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_client, "_REFRESH", 0.05)
    authority = Authority(tmp_path)
    files = authority.node("n1", role="swarm-worker")
    async with serving(authority.node("m1"), "m1", "n1", "n2") as server, told_by(server, files) as agent:
        assert set(server.nodes) == {"n1"}
        heard: list[tuple[str, int]] = []
        server._on_report = lambda node, report: heard.append((node, len(report.verdicts)))
        await agent.report(wire.Report({"task": wire.HealthReport("up", "")}))
        await until(lambda: heard, "it reports")
        assert {node for node, _ in heard} == {"n1"}
        server.refused["foreign_verdict"] = 0  # the manager knows of no tasks
        become(files, authority.node("n2", role="swarm-worker"))
        await until(lambda: set(server.nodes) == {"n2"}, "it is known by its new identity")
        links = agent._links.values()  # one that was made while the files changed is made again
        await until(lambda: all(not link.outdated and link.connected for link in links) and len(server._peers) == 1)
        assert "n2" in {node for node, _ in heard} and not server.refused["foreign_verdict"]
        assert not any(peer.early for peer in server._peers)  # nothing of what it was before
        renewed = authority.certificate("n2", "swarm-worker")  # of the same node: nothing happens
        (peer,) = server._peers
        files.certificate.write_bytes(renewed)
        await asyncio.sleep(0.3)
        assert server._peers == {peer}


async def test_a_manager_that_has_joined_anew_ends_its_connections(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.node("m1")
    async with serving(files, "m1", "m2", "n1") as server:
        async with calling(server.port, context_of(authority.node("n1", role="swarm-worker"))) as socket:
            await until(lambda: len(server.nodes) == 1, "it is let in")
            server.look_again()
            become(files, authority.node("m2"))
            server.look_again()
            ended = await asyncio.wait_for(socket.receive(), 5)
            assert ended.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
        await until(lambda: not server.nodes, "nobody is connected")
