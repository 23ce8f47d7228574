# SPDX-License-Identifier: Apache-2.0
"""The HTTP and control API: what a running agent shows, and what it can be told.

`view` is the contract, `state` implements it, `app` has the routes, `server` the sockets, `endpoint` reads
ADDRESS:PORT; `services` and `explain` make the large answers, `drained` keeps what an operator drained. Keys of answers
are an interface: docs/OPERATIONS.md.
May import cluster, health, reconcile, metrics and what is below; not the agent.
"""
