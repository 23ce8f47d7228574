# SPDX-License-Identifier: Apache-2.0
"""`mesh check`: whether the daemon can run here, and what would help.

`command` asks, `host`, `docker`, `firewall` and `cluster` answer with Findings (`finding`). Changes nothing, and works
while a daemon runs. May import everything below the CLI.
"""
