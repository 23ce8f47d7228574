# SPDX-License-Identifier: Apache-2.0
"""Configuration: what can be set (`keys`), and how file, environment and flags become one `Config` (`load`).

Knows no other part of mesh but `mesh.errors`.
"""
