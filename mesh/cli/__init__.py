# SPDX-License-Identifier: Apache-2.0
"""The command `mesh`: nouns read, verbs change. Talks to the daemon through `<state_dir>/mesh.sock`."""

from mesh.cli.main import main

__all__ = ["main"]
