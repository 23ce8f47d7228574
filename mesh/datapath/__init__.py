# SPDX-License-Identifier: Apache-2.0
"""Engines, which forward, and what they share.

`base` is the contract (Applied, Plan, Datapath), `counters` the counters that every engine has, `lookup` a flow's way
through tables, `netlink` the network as the kernel tells it, `losses` what somebody else removes of ours from the
kernel, and `conntrack` its memory of UDP flows. `kernel` and `proxy` are the engines: they hold what they are given and
never choose. `paths` tries the paths to other nodes.
May import `mesh.config`, the extensions and the ground. The contract modules import no implementation.
"""
