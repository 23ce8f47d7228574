# SPDX-License-Identifier: Apache-2.0
"""One inventory and one health view on all nodes of a swarm: a manager's agent reads and tells, a worker's is told.

`provider` is the Provider of a swarm's node, `roles` decides who reads and who is told, `verdicts` merges health behind
the readiness gate (`readiness`). `heartbeat` and `liveness` detect failed agents and nodes. `relay_server` and
`relay_client` are both ends of the connection, `wire` its messages, `translate` the model in them, `credentials` its
mutual TLS by Swarm's own certificates. `reports` and `agreement` are what a manager knows of the other agents.

`wire` is a protocol between builds: fields are added with defaults, never renamed or given another meaning.
May import the contracts, `mesh.providers`, `mesh.config` and the ground; not health, reconcile or engines.
"""
