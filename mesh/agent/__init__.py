# SPDX-License-Identifier: Apache-2.0
"""The daemon: the composition root (`agent`, `wiring`), how it starts, reloads, is taken over and ends.

The only package that wires the parts together; imports all but `mesh.cli` and `mesh.trace`.
"""
