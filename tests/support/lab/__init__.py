# SPDX-License-Identifier: Apache-2.0
"""The lab: network namespaces and real dockerd swarms in them, as Python objects and pytest fixtures."""
