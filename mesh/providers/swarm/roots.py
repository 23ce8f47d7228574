# SPDX-License-Identifier: Apache-2.0
"""Whose certificates a node of a swarm accepts: the root's, and during a rotation of the root the next one's.

While `docker swarm ca --rotate` is pending, all nodes trust the former root. Renewed certificates are of the next CA,
whose own certificate, signed by the former root, follows them in the same file. Both CAs have one name, and that
certificate does not say which key has signed it: OpenSSL takes it for self-signed, and rejects every chain that ends
there. So it is looked for beforehand, and trusted if the root has signed it (swarmkit, CrossSignCACertificate).
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding


def trusted(roots: bytes, chain: Sequence[x509.Certificate]) -> str:
    """The certificates to trust, as PEM: the roots, and of a node's chain the CAs that one of them has signed.

    Args:
        roots: PEM.

    Raises:
        ValueError: `roots` has no certificate in PEM, or one that cannot be read.
    """
    held = x509.load_pem_x509_certificates(roots)
    signed = [each for each in chain if _is_ca(each) and any(_has_signed(root, each) for root in held)]
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in (*held, *signed))


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _has_signed(root: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
