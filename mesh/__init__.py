# SPDX-License-Identifier: Apache-2.0
"""mesh: a routing mesh for Docker Swarm that forwards in eBPF or Cython, chosen by stateless consistent hashing."""

from typing import TYPE_CHECKING

__version__: str

if not TYPE_CHECKING:  # for type checkers no other name is here

    def __getattr__(name):
        """`__version__`, looked up when it is first asked for: few commands need it, and reading it takes a while."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 -- see above

        try:
            found = version("mesh")
        except PackageNotFoundError:  # run from a source tree that was never installed
            found = "0.0.0+source"
        globals()["__version__"] = found
        return found
