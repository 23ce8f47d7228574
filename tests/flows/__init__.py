# SPDX-License-Identifier: Apache-2.0
"""Random flows through three nodes while tasks and tables change (`make random`): `nodes` is what they meet, `changes`
what happens meanwhile, `check` says of each flow whether that was right."""
