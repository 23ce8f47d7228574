# SPDX-License-Identifier: Apache-2.0
"""`mesh bench`: how fast a service is through the mesh, how evenly spread, compared with direct calls.

`command` runs it, `target` finds whom to call, `load` and `http` call, `report` sums up. Opens connections to the given
service only. May import everything below the CLI.
"""
