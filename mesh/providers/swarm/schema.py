# SPDX-License-Identifier: Apache-2.0
"""The parts of the Engine API's answers that are used; all other fields are ignored.

Source: Docker Engine API reference, v1.41 and later (ServiceList, TaskList, NodeList, ContainerList, NetworkInspect,
SystemInfo, SystemVersion, SystemEvents).
"""

from __future__ import annotations

import ipaddress
from typing import TypeVar

import msgspec
from msgspec import Struct, field

from mesh.errors import ProviderError
from mesh.model import Address
from mesh.netaddr import split_host_port

T = TypeVar("T")


class _Part(Struct, frozen=True, gc=False, rename="pascal"):
    pass


class Version(_Part, frozen=True):
    """GET /version."""

    api_version: str
    version: str = ""
    min_api_version: str = field(default="1.12", name="MinAPIVersion")


class RemoteManager(_Part, frozen=True):
    node_id: str = field(default="", name="NodeID")
    addr: str = ""


class SwarmInfo(_Part, frozen=True):
    node_id: str = field(default="", name="NodeID")
    local_node_state: str = ""
    control_available: bool = False
    remote_managers: list[RemoteManager] | None = None


class Info(_Part, frozen=True):
    """GET /info."""

    swarm: SwarmInfo
    name: str = ""


class Port(_Part, frozen=True):
    protocol: str
    target_port: int
    published_port: int = 0
    publish_mode: str = "ingress"


class Endpoint(_Part, frozen=True):
    ports: list[Port] | None = None


class ContainerSpec(_Part, frozen=True):
    labels: dict[str, str] | None = None


class TaskTemplate(_Part, frozen=True):
    container_spec: ContainerSpec | None = None


class Replicated(_Part, frozen=True):
    replicas: int | None = None


class Mode(_Part, frozen=True):
    replicated: Replicated | None = None


class ServiceSpec(_Part, frozen=True):
    name: str
    labels: dict[str, str] | None = None
    mode: Mode | None = None
    task_template: TaskTemplate | None = None


class Service(_Part, frozen=True):
    """One of GET /services."""

    spec: ServiceSpec
    id: str = field(name="ID")
    endpoint: Endpoint | None = None


class ContainerStatus(_Part, frozen=True):
    container_id: str = field(default="", name="ContainerID")


class TaskStatus(_Part, frozen=True):
    state: str
    container_status: ContainerStatus | None = None


class Task(_Part, frozen=True):
    """One of GET /tasks."""

    status: TaskStatus
    desired_state: str
    id: str = field(name="ID")
    service_id: str = field(default="", name="ServiceID")
    node_id: str = field(default="", name="NodeID")
    slot: int = 0


class NodeSpec(_Part, frozen=True):
    labels: dict[str, str] | None = None


class NodeDescription(_Part, frozen=True):
    hostname: str = ""


class NodeStatus(_Part, frozen=True):
    state: str = ""
    addr: str = ""


class ManagerStatus(_Part, frozen=True):
    addr: str = ""


class Node(_Part, frozen=True):
    """One of GET /nodes."""

    id: str = field(name="ID")
    spec: NodeSpec = NodeSpec()
    description: NodeDescription = NodeDescription()
    status: NodeStatus = NodeStatus()
    manager_status: ManagerStatus | None = None


class Attachment(_Part, frozen=True):
    """A container's place on a network. `gateway`: by which it could leave; of overlay networks none."""

    network_id: str = field(default="", name="NetworkID")
    endpoint_id: str = field(default="", name="EndpointID")
    gateway: str = ""
    ipv6_gateway: str = field(default="", name="IPv6Gateway")
    ip_address: str = field(default="", name="IPAddress")
    global_ipv6_address: str = field(default="", name="GlobalIPv6Address")
    gw_priority: int = 0


class NetworkSettings(_Part, frozen=True):
    networks: dict[str, Attachment] | None = None  # by the network's name


class Container(_Part, frozen=True):
    """One of GET /containers/json."""

    id: str
    labels: dict[str, str] | None = None
    state: str = ""
    network_settings: NetworkSettings | None = None


class ContainerInspect(_Part, frozen=True):
    """GET /containers/ID/json."""

    network_settings: NetworkSettings | None = None


class NetworkEndpoint(_Part, frozen=True):
    ipv4_address: str = field(default="", name="IPv4Address")
    ipv6_address: str = field(default="", name="IPv6Address")


class Network(_Part, frozen=True):
    """GET /networks/docker_gwbridge."""

    name: str
    containers: dict[str, NetworkEndpoint]


class NetworkSummary(_Part, frozen=True):
    """One of GET /networks."""

    name: str = ""
    id: str = ""
    driver: str = ""
    internal: bool = False
    ingress: bool = False
    options: dict[str, str] | None = None


class Actor(_Part, frozen=True):
    id: str = field(default="", name="ID")
    attributes: dict[str, str] | None = None


class Event(_Part, frozen=True):
    """One of GET /events."""

    type: str = ""
    action: str = ""
    actor: Actor = Actor()


def parse(body: bytes, kind: type[T], source: str) -> T:
    """One JSON body.

    Raises:
        ProviderError: it is not JSON, or not what `kind` asks for; `where` has the source, the message the JSON path.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProviderError(
            f"unusable answer of the Engine: {error}", where=source, remedy="the last known state stays in use"
        ) from None


def address_of(text: str) -> Address | None:
    """An address with or without prefix length or port; None where there is none, or the unspecified one."""
    try:
        address = ipaddress.ip_address(split_host_port(text.partition("/")[0], default=0)[0])
    except ValueError:
        return None
    return None if address.is_unspecified else address
