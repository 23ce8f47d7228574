# SPDX-License-Identifier: Apache-2.0
"""What is measured side by side. Each side is a class here, with its configuration beside it and the reason for it."""

from bench.peers.base import Side
from bench.peers.docker_mesh import DockerMesh
from bench.peers.docker_proxy import DockerProxy
from bench.peers.envoy import Envoy
from bench.peers.haproxy import HAProxy
from bench.peers.mesh import MeshKernel, MeshKernelFresh, MeshKernelWide, MeshProxy, MeshProxyFresh, MeshProxyWide
from bench.peers.nft import Nft, NftWide
from bench.peers.nginx import Nginx
from bench.peers.plain import Plain
from bench.peers.uvloop_proxy import UvloopProxy

SIDES: tuple[type[Side], ...] = (
    Plain,
    MeshKernel,
    MeshProxy,
    Nft,
    HAProxy,
    Nginx,
    Envoy,
    UvloopProxy,
    DockerProxy,
    DockerMesh,
    MeshKernelFresh,
    MeshProxyFresh,
    MeshKernelWide,
    MeshProxyWide,
    NftWide,
)

__all__ = ["SIDES", "Side"]
