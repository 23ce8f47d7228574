# SPDX-License-Identifier: Apache-2.0
"""The log's lines, for people and for programs that read them."""

from __future__ import annotations

import ipaddress

import pytest
import structlog
from structlog.testing import capture_logs

from mesh.agent import changelog, logging
from mesh.config.keys import Config
from mesh.model import Backend, Inventory, Node, Service
from mesh.reconcile.loop import Picture


def test_lines_name_nodes_by_name() -> None:
    nodes = (Node("id-of-one", "one"),)
    backends = (
        Backend("t1", "s", "id-of-one", ipaddress.ip_address("192.0.2.1"), name="web.1"),
        Backend("t2", "s", "unheard-of", ipaddress.ip_address("192.0.2.2"), name="web.2"),
    )
    picture = Picture(Inventory((Service("s", "web", ()),), backends, nodes))
    with capture_logs() as lines:
        changelog.tell(Picture(), picture)
        changelog.tell(picture, Picture())
    assert [line["node"] for line in lines if "backend" in line] == ["one", "unheard-of"] * 2


def test_a_boolean_has_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        logging.configure(Config(log_format="logfmt"))
        structlog.get_logger("mesh").info("node disconnected", silent=True)
    finally:
        structlog.reset_defaults()
    assert "silent=true" in capsys.readouterr().err
