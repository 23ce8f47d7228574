# SPDX-License-Identifier: Apache-2.0
"""The metrics in Prometheus text and OpenMetrics.

`families` declares each metric (name, labels, help; the table in docs/OPERATIONS.md is made of it), `exposition` fills
them from an engine's counters and the agent's state, `series` writes the many lines of frontends and backends.
Names and labels are an interface: a rename goes into CHANGELOG.md. Reads only, on any thread.
May import the contracts, `mesh.api.view` among them, and the ground.
"""
