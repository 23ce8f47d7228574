# SPDX-License-Identifier: Apache-2.0
"""Two nodes that agree, as the comparison of nodes sees them."""

from __future__ import annotations

from dataclasses import replace

from mesh.cluster.agreement import Row

WEB, DNS = "[*]:80/tcp", "[*]:53/udp"
ONE = Row("1", "one", "192.0.2.1", True, "proxy", "0.1", 7, 0.0, {WEB: "aa", DNS: "bb"})
TWO = replace(ONE, id="2", name="two", generation=3, age=0.9)
