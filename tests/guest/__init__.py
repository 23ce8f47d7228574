# SPDX-License-Identifier: Apache-2.0
"""Tests that run inside a virtual machine with Debian's stock kernel."""
