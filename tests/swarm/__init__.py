# SPDX-License-Identifier: Apache-2.0
"""Tests against real swarms. A package, so that its modules share them."""
