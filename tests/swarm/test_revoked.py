# SPDX-License-Identifier: Apache-2.0
"""A node that is removed from a real swarm: its certificate is revoked, and swarm's own list of these is read."""

from __future__ import annotations

import pytest

from mesh.cluster.credentials import Files, load
from mesh.config.keys import Config
from mesh.errors import ProviderError
from mesh.providers.swarm.revoked import revoked
from tests.support.lab.dockerd import Node, Swarm

pytestmark = [pytest.mark.root, pytest.mark.swarm]


def identity(node: Node) -> str:
    return load(Files.of(Config(docker_data_root=str(node.data_root)))).identity.node


async def of(node: Node) -> frozenset[str]:
    return await revoked(node.exec_root / "swarm" / "control.sock", node.data_root / "swarm" / "certificates")


async def test_the_certificate_of_a_removed_node_is_revoked(swarm3: Swarm) -> None:
    manager, worker = swarm3.nodes[0], swarm3.nodes[-1]
    before = await of(manager)
    assert not before & {identity(node) for node in swarm3.nodes}
    with pytest.raises(ProviderError):
        await of(worker)
    joins = swarm3.join_one("joins")
    try:
        assert identity(joins) not in await of(manager)
        swarm3.docker("node", "rm", "--force", identity(joins))
        assert await of(manager) == before | {identity(joins)}
    finally:
        joins.close()
