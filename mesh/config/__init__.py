# SPDX-License-Identifier: Apache-2.0
"""Configuration: what can be set (`keys`), and how file, environment and flags become one `Config` (`load`).

A key is added in `keys` only: flags, environment, README and the example file follow. A renamed key keeps its former
name in `was`. May import `mesh.model` and `mesh.errors`.
"""
