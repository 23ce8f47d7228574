# SPDX-License-Identifier: Apache-2.0
"""From what is known to what an engine is told: inventory, health and drains in, plans out.

`eligibility`, `compose`, `guard` and `plan` are pure: they do no I/O, ask no clock and change no argument but a cache.
`loop` is the one writer: it calls them on a worker thread and applies the plan. Every node must compose the same tables
of the same inventory, so order and hashing here are a contract between nodes.
May import the contracts, `mesh._maglev`, `mesh.config` and the ground; not a provider, an engine or the cluster.
"""
