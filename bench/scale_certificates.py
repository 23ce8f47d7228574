# SPDX-License-Identifier: Apache-2.0
"""Certificates as a swarm gives them to its nodes, for a swarm that is simulated."""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLUSTER = "c" * 25
LIFE = datetime.timedelta(days=90)


def name(node: str, role: str) -> x509.Name:
    """CN, OU and O as swarm sets them."""
    parts = (
        (NameOID.ORGANIZATION_NAME, CLUSTER),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        (NameOID.COMMON_NAME, node),
    )
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


class Authority:
    """A swarm's CA. All nodes have one key: it is who they are that differs."""

    def __init__(self) -> None:
        self._own, self._key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        self._issuer = name("swarm-ca", "swarm-ca")
        made = self._builder(self._issuer, self._own, *self._life())
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.root = made.sign(self._own, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.key = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @staticmethod
    def _life() -> tuple[datetime.datetime, datetime.datetime]:
        now = datetime.datetime.now(datetime.UTC)
        return now - LIFE, now + LIFE

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begins: datetime.datetime, ends: datetime.datetime
    ) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder(self._issuer, subject, key.public_key(), x509.random_serial_number())
        return made.not_valid_before(begins).not_valid_after(ends)

    def certificate(self, node: str, role: str, *life: datetime.datetime) -> bytes:
        """A node's, as PEM. `life`: when it begins and ends; else it is valid now."""
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        names = x509.SubjectAlternativeName([x509.DNSName(role), x509.DNSName(node)])
        made = self._builder(name(node, role), self._key, *(life or self._life())).add_extension(usage, critical=False)
        signed = made.add_extension(names, critical=False).sign(self._own, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    def write(self, directory: Path, node: str, role: str, *life: datetime.datetime) -> None:
        """The files of a node; see `certificate`."""
        directory.mkdir(parents=True)
        (directory / "swarm-root-ca.crt").write_bytes(self.root)
        (directory / "swarm-node.crt").write_bytes(self.certificate(node, role, *life))
        (directory / "swarm-node.key").write_bytes(self.key)

    def _context(self, protocol: int, node: str, role: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.load_verify_locations(cadata=self.root.decode())
        memory = os.memfd_create("certificate")
        try:
            os.write(memory, self.certificate(node, role) + self.key)
            context.load_cert_chain(f"/proc/self/fd/{memory}")
        finally:
            os.close(memory)
        return context

    def server(self, node: str) -> ssl.SSLContext:
        """A manager's, that asks callers for theirs."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, node, "swarm-manager")
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self, node: str) -> ssl.SSLContext:
        """A worker's."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, node, "swarm-worker")
