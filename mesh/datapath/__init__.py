# SPDX-License-Identifier: Apache-2.0
"""Engines, which forward, and what they share.

`base` is the contract (Applied, Plan, Datapath), `counters` the counters that every engine has, `lookup` a flow's way
through tables, `netlink` the network as the kernel tells it. `kernel` and `proxy` are the engines: they hold what they
are given and never choose. `paths` tries the paths to other nodes.
May import `mesh.config`, the extensions and the ground. The contract modules import no implementation.
"""
