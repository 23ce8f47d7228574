# SPDX-License-Identifier: Apache-2.0
"""`python -m mesh` is the command `mesh`."""

from mesh.cli.main import main

main(prog_name="mesh")
