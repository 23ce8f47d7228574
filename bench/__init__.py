# SPDX-License-Identifier: Apache-2.0
"""Measurements against peers. `make bench` runs them, bench/README.md explains them."""
