# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS with the certificates that Swarm gives every node: no secret of our own to hand out or to rotate.

A node certificate has CN = node id, OU = swarm-manager | swarm-worker, O = cluster id, and the role as a DNS name
(moby/swarmkit, ca/certificates.go). The key's PEM carries headers of swarm's own (kek-version, raft-dek) that OpenSSL
refuses; they are stripped in memory.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from mesh.config.keys import Config
from mesh.errors import MeshError, plain
from mesh.providers.swarm.roots import trusted

MANAGER: Final = "swarm-manager"
_REMEDY_AUTOLOCK: Final = (
    "the swarm is autolocked, so its key is encrypted: give this node a certificate of the swarm's CA "
    "with cluster_certificate, cluster_key and cluster_ca"
)
_REMEDY_BROKEN: Final = "restore the file; a node that has lost it has to leave the swarm and join again"
_REMEDY_EXPIRED: Final = "swarm should have renewed it: is dockerd here in reach of a manager, TCP 2377?"
_REMEDY_LEFT: Final = "the certificate is gone: stop mesh here (`mesh stop --release`), or join the node again"
_REMEDY_EARLY: Final = "is this node's clock right?"


class CredentialsError(MeshError):
    """The node's certificate, key or CA cannot be used; the message names the file and the way out."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the other side of a connection, or this node, is."""

    node: str
    role: str  # swarm-manager | swarm-worker
    cluster: str

    @property
    def is_manager(self) -> bool:
        return self.role == MANAGER


def is_same(one: Identity, other: Identity) -> bool:
    """Whether both are one node of one swarm, in whatever role."""
    return (one.node, one.cluster) == (other.node, other.cluster)


@dataclass(frozen=True, slots=True)
class Files:
    """Where the certificates lie."""

    ca: Path
    certificate: Path
    key: Path

    @staticmethod
    def of(config: Config) -> Files:
        """As configured, else where Swarm keeps them under the data root."""
        base = Path(config.docker_data_root) / "swarm" / "certificates"
        return Files(
            Path(config.cluster_ca or base / "swarm-root-ca.crt"),
            Path(config.cluster_certificate or base / "swarm-node.crt"),
            Path(config.cluster_key or base / "swarm-node.key"),
        )

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever a file does: certificates are rotated in place."""
        return tuple(part for path in (self.ca, self.certificate, self.key) for part in _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Credentials:
    """One reading of the files: contexts for both directions, and who we are."""

    identity: Identity
    begins: datetime
    expires: datetime
    server: ssl.SSLContext
    client: ssl.SSLContext


def strip_headers(pem: bytes) -> bytes:
    """A PEM without the header lines (RFC 1421) between its BEGIN line and its body."""
    return re.sub(rb"(-----BEGIN [A-Z ]+-----\r?\n)(?:[\w-]+: [^\n]*\n)+\r?\n?", rb"\1", pem)


def load(files: Files) -> Credentials:
    """Read certificates and key.

    Raises:
        CredentialsError: a file is missing, encrypted or not what it should be.
    """
    try:
        certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
        roots = files.ca.read_bytes()
    except OSError as error:
        raise CredentialsError(
            f"cannot be read: {error.strerror}",
            where=str(error.filename),
            remedy="is this node in a swarm, and docker_data_root right?",
        ) from error
    if b"ENCRYPTED" in key:
        raise CredentialsError("the key is encrypted", where=str(files.key), remedy=_REMEDY_AUTOLOCK)
    if b" PRIVATE KEY-----" not in key:
        raise CredentialsError("is no private key in PEM", where=str(files.key), remedy=_REMEDY_BROKEN)
    try:
        parsed, *behind = x509.load_pem_x509_certificates(certificate)
    except ValueError:
        raise CredentialsError(
            "is no certificate in PEM", where=str(files.certificate), remedy=_REMEDY_BROKEN
        ) from None
    try:
        identity = Identity(
            _subject(parsed, NameOID.COMMON_NAME),
            _subject(parsed, NameOID.ORGANIZATIONAL_UNIT_NAME),
            _subject(parsed, NameOID.ORGANIZATION_NAME),
        )
    except (ValueError, IndexError):
        said = "is not a node's certificate: it lacks the node, its role or the cluster"
        raise CredentialsError(said, where=str(files.certificate), remedy=_REMEDY_BROKEN) from None
    try:
        ca = trusted(roots, behind)
    except ValueError:
        raise CredentialsError("is no certificate in PEM", where=str(files.ca), remedy=_REMEDY_BROKEN) from None
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the name, which is the role: see Relay's client
    chain = certificate + b"\n" + strip_headers(key)
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cadata=ca)
            _load_chain(context, chain)
        except (ssl.SSLError, ValueError) as error:
            said = f"OpenSSL cannot use it: {plain(error)}"
            if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
                said = f"is not the key of {files.certificate}"
            raise CredentialsError(said, where=str(files.key), remedy=_REMEDY_BROKEN) from error
    return Credentials(identity, parsed.not_valid_before_utc, parsed.not_valid_after_utc, server, client)


def _subject(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    return str(certificate.subject.get_attributes_for_oid(oid)[0].value)


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """ssl reads files only: an anonymous one in memory, so that no stripped key ever lies on a disk."""
    descriptor = os.memfd_create("mesh-credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def peer_identity(certificate: Mapping[str, Any]) -> Identity:
    """Who a verified peer is, from `SSLObject.getpeercert()`.

    Raises:
        CredentialsError: the certificate does not say.
    """
    subject = {name: value for entry in certificate.get("subject", ()) for name, value in entry}
    try:
        return Identity(subject["commonName"], subject["organizationalUnitName"], subject["organizationName"])
    except KeyError as error:
        raise CredentialsError(f"a peer's certificate has no {error.args[0]}", where="relay") from error


class CredentialsWatch:
    """The current credentials, read again when the files change; the last good ones stay when a reading fails."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._stamp: tuple[int, ...] = ()
        self._current: Credentials | None = None
        self.error = ""

    def current(self) -> Credentials:
        """Credentials as of now.

        Raises:
            CredentialsError: there never were good ones.
        """
        stamp = self._files.stamp()
        if stamp != self._stamp or self._current is None:
            try:
                self._current = load(self._files)
                self._stamp = stamp
                self.error = ""
            except CredentialsError as error:
                self.error = str(error)
                if self._current is None:
                    raise
        return self._current

    def expires(self) -> float | None:
        """When the certificate that is used expires, in Unix seconds; None: none is used yet."""
        return self._current.expires.timestamp() if self._current is not None else None

    def left(self) -> bool:
        """Whether this node has left its swarm: Swarm has removed the certificate that is used."""
        return self._current is not None and not self._files.certificate.exists()

    def problem(self) -> str:
        """What is wrong with the certificate that is used, or why newer ones are not; empty: nothing."""
        if self._current is None:  # who needs them says so
            return ""
        if self.left():
            return str(
                CredentialsError(
                    "this node has left the swarm", where=str(self._files.certificate), remedy=_REMEDY_LEFT
                )
            )
        if self.error:
            return self.error
        now, where = datetime.now(UTC), str(self._files.certificate)
        if now > self._current.expires:
            said = f"expired on {self._current.expires:%Y-%m-%d %H:%M} UTC, other nodes refuse it"
            return str(CredentialsError(said, where=where, remedy=_REMEDY_EXPIRED))
        if now < self._current.begins:
            said = f"is not valid before {self._current.begins:%Y-%m-%d %H:%M} UTC, and here it is {now:%Y-%m-%d %H:%M}"
            return str(CredentialsError(said, where=where, remedy=_REMEDY_EARLY))
        return ""
