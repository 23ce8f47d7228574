# SPDX-License-Identifier: Apache-2.0
"""mesh: a routing mesh for Docker Swarm that forwards in eBPF or Cython, chosen by stateless consistent hashing."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mesh")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
