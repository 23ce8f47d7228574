# SPDX-License-Identifier: Apache-2.0
"""The daemon: the composition root (`agent`), how it starts, reloads, is taken over and ends.

`wiring` alone chooses and builds parts; each is given all it needs at construction. `reload` is SIGHUP, `takeover` both
sides of a hand-over, `lock` one daemon for one state directory, `held` has what the guard holds back probed, `logging`
and `changelog` are the log, `systemd` what the service manager is told.
May import everything but `mesh.cli` and `mesh.trace`.
"""
