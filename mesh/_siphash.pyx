# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""SipHash-2-4 for Python; bpf/include/mesh/siphash.h has the code."""

from libc.stdint cimport uint8_t

KEY_SIZE = 16


def siphash(bytes key not None, bytes data not None):
    """The 64-bit hash of some bytes under a key of KEY_SIZE bytes."""
    if len(key) != 16:
        raise ValueError("a key is 16 bytes")
    return mesh_siphash24(<const uint8_t *>key, <const uint8_t *>data, len(data))
