# SPDX-License-Identifier: Apache-2.0
"""The command `mesh`: nouns read, verbs change.

`main` has the commands and their errors, `read` and `change` most of them; `run` starts the daemon, `check` and `bench`
are packages. `client` talks to the daemon through `<state_dir>/mesh.sock`, `output` prints, `exit` has the exit codes.
The top layer: may import everything, and nothing imports it. What the others do not need is imported late, since a
command should answer at once.
"""

from mesh.cli.main import main

__all__ = ["main"]
