# SPDX-License-Identifier: Apache-2.0
"""`mesh bench`: how fast a service is through the mesh, how evenly spread, and what that costs beside a direct call."""
