# SPDX-License-Identifier: Apache-2.0
"""The parts of the Engine API's answers that are used; all other fields are ignored.

Source: Docker Engine API reference, v1.41 and later (ServiceList, TaskList, NodeList, ContainerList, NetworkInspect,
SystemInfo, SystemVersion, SystemEvents).
"""

from __future__ import annotations

from msgspec import Struct, field


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


class Container(_Part, frozen=True):
    """One of GET /containers/json."""

    id: str
    labels: dict[str, str] | None = None
    state: str = ""


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
