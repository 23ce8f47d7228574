# SPDX-License-Identifier: Apache-2.0
"""Paths to other nodes: the tunnel and the peer port, tried from here.

`monitor` decides which are up; `tunnel_probe` and `peer_probe` send one trial each.
May import `mesh.config` and the ground; not an engine.
"""
