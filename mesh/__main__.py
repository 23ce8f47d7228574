# SPDX-License-Identifier: Apache-2.0
"""`python -m mesh` is the command `mesh`."""

from mesh.cli import main

main(prog_name="mesh")
