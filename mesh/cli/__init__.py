# SPDX-License-Identifier: Apache-2.0
"""The command `mesh`, one file per command; `check` and `bench` are packages.

Commands that read or change a running daemon talk to it through `<state_dir>/mesh.sock` (`client`). `main` registers
the commands; a command imports `exit`, `client` and `output` of this package and no other command.
"""
