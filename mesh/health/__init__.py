# SPDX-License-Identifier: Apache-2.0
"""Probes of this node's own backends, and what they come to.

`monitor` decides who is probed when, `probe` makes one, `damping` turns results into UP and DOWN. Whose
verdict counts for other nodes' backends is the business of `mesh.cluster`; whether a DOWN backend is used, that of
`mesh.reconcile`.
May import the contracts, `mesh.config` and the ground; not the cluster, the loop or an engine.
"""
