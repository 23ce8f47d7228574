# SPDX-License-Identifier: Apache-2.0
"""`mesh check`: whether the daemon can run here, and what would help."""
