# SPDX-License-Identifier: Apache-2.0
"""The Engine's answers -> Inventory. Pure: the rules that decide which task gets traffic live here only."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from mesh.errors import ProviderError
from mesh.incremental import KeyedCache, Latest
from mesh.model import Address, Backend, Intent, Inventory, Node, Problem, PublishedPort, Service
from mesh.model import Protocol as Transport
from mesh.netaddr import usable
from mesh.providers import labels
from mesh.providers.swarm import schema
from mesh.providers.swarm.legs import Leg
from mesh.providers.swarm.schema import address_of, parse

T = TypeVar("T")

TASK_LABEL: Final = "com.docker.swarm.task.id"
GONE: Final = "no container runs"
UNREADY: Final = "not ready"
NO_GATEWAY: Final = b'{"Name": "", "Containers": {}}'
_PROTOCOLS: Final = {"tcp": Transport.TCP, "udp": Transport.UDP}
_STARTING: Final = frozenset({"starting"})  # the container exists; its HEALTHCHECK has not passed yet
_RUNNING: Final = frozenset({"running"})


@dataclass(frozen=True, slots=True)
class Answers:
    """Bodies of one complete read. `unready` lists the containers that are starting or unhealthy by HEALTHCHECK."""

    info: bytes
    services: bytes
    tasks: bytes
    nodes: bytes
    containers: bytes
    unready: bytes
    gateway: bytes  # network docker_gwbridge; NO_GATEWAY while there is none
    legs: Mapping[str, Leg] = field(default_factory=dict, kw_only=True)  # of containers that are not on it, by id


@dataclass(frozen=True, slots=True)
class Local:
    """This node's part: which containers of tasks run, which are not ready, and where they are reached."""

    node: str = ""
    running: frozenset[str] = frozenset()
    unready: frozenset[str] = frozenset()
    addresses: Mapping[str, Address] | None = None
    unreached: Mapping[str, str] = field(default_factory=dict)  # why this node does not reach a container, by id


@dataclass(frozen=True, slots=True)
class Read:
    """A decoded read. `unseen`: why this node's tasks do not serve that other nodes take for ready, by task."""

    inventory: Inventory
    local: Local
    unseen: Mapping[str, str] = field(default_factory=dict)


_Here = tuple[bool, bool, Address | None, str]
"""Of a task's container on this node: it runs, is not ready, its address, and why it has none."""
_Input = tuple[schema.Task, str, _Here | None]  # a task, its service's name, and its container if it is on this node
_Parsed = tuple[tuple[T, ...], list[Problem]]


def decode(answers: Answers) -> Read:
    """One read by itself; see Decoder."""
    return Decoder().decode(answers)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a wrong label keeps: the last good labels of services and weights of nodes, by id."""

    services: Mapping[str, labels.Accepted] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)


class Decoder:
    """Decodes successive reads. What has not changed since the last read stays the same object.

    Later steps compare by identity first. Not safe for two threads at once.

    Args:
        accepted: what was good before this process.

    Attributes:
        accepted: the same after the last read; replaced whole.
    """

    def __init__(self, accepted: Accepted | None = None) -> None:
        self.accepted = accepted or Accepted()
        self._parse_services: Latest[bytes, _Parsed[Service]] = Latest()
        self._parse_nodes: Latest[bytes, _Parsed[Node]] = Latest()
        self._services: _Parsed[Service] = (), []
        self._nodes: _Parsed[Node] = (), []
        self._tasks: KeyedCache[str, _Input, Backend | None] = KeyedCache()
        self._own: dict[str, schema.Task] = {}  # those on this node
        self._backends: tuple[Backend, ...] = ()

    def decode(self, answers: Answers) -> Read:
        """The inventory of one complete read; equal reads give equal inventories.

        Raises:
            ProviderError: a body cannot be used, or the node is no manager.
        """
        local = _manager(answers)
        self._services = self._parse_services.of(answers.services, self._read_services)
        tasks = parse(answers.tasks, list[schema.Task], "GET /tasks")
        self._nodes = self._parse_nodes.of(answers.nodes, self._read_nodes)
        self._own.clear()
        return self._read(self._tasks.update(self._inputs(tasks, local), _backend), local)

    def update(self, answers: Answers, asked: Collection[str]) -> Read:
        """The inventory after a read of some tasks, by id: those that were not found are gone, all others are as they
        were. Services and nodes are those of the last complete read.

        Raises:
            ProviderError: as `decode`.
        """
        local = _manager(answers)
        tasks = {task.id: task for task in parse(answers.tasks, list[schema.Task], "GET /tasks")}
        gone = [task for task in asked if task not in tasks]
        for task in gone:
            self._own.pop(task, None)
        own = [task for key, task in self._own.items() if key not in tasks]  # their containers may have changed
        return self._read(self._tasks.amend(self._inputs([*tasks.values(), *own], local), gone, _backend), local)

    def _read_services(self, body: bytes) -> _Parsed[Service]:
        services, problems, accepted = _services(body, self.accepted.services)
        if accepted != self.accepted.services:
            self.accepted = replace(self.accepted, services=accepted)
        return services, problems

    def _read_nodes(self, body: bytes) -> _Parsed[Node]:
        nodes, problems = _nodes(body, self.accepted.weights)
        weights = {node.id: node.weight for node in nodes if node.weight != 1}
        if weights != self.accepted.weights:
            self.accepted = replace(self.accepted, weights=weights)
        return nodes, problems

    def _inputs(self, tasks: Iterable[schema.Task], local: Local) -> Iterator[tuple[str, _Input]]:
        names = {service.id: service.name for service in self._services[0]}
        addresses = local.addresses or {}
        for task in tasks:
            name = names.get(task.service_id)
            if name is None:
                continue
            here = None
            if task.node_id == local.node:
                self._own[task.id] = task
                container = _container(task)
                unreached = local.unreached.get(container, "")
                here = container in local.running, container in local.unready, addresses.get(container), unreached
            yield task.id, (task, name, here)

    def _read(self, found: Mapping[str, Backend | None], local: Local) -> Read:
        backends = tuple(sorted((backend for backend in found.values() if backend is not None), key=_by_id))
        if backends != self._backends:
            self._backends = backends
        inventory = Inventory(
            services=self._services[0],
            backends=self._backends,
            nodes=self._nodes[0],
            problems=(*self._nodes[1], *self._services[1]),
            source="swarm",
        )
        return Read(inventory, local, _unseen(self._own.values(), local))


_by_id: Final = operator.attrgetter("id")


def _manager(answers: Answers) -> Local:
    """This node's part of the answers.

    Raises:
        ProviderError: a body cannot be used, or the node is no manager.
    """
    info = parse(answers.info, schema.Info, "GET /info")
    if not info.swarm.control_available:
        raise not_a_manager(info.swarm.local_node_state)
    return local_of(info.swarm.node_id, answers)


def not_a_manager(state: str) -> ProviderError:
    """The error for a node that cannot answer for the swarm; `state` is Swarm.LocalNodeState."""
    if state == "active":
        return ProviderError(
            "this node is a swarm worker, and only managers know services and tasks",
            where="GET /info",
            remedy="run on a manager, or promote the node: docker node promote",
        )
    return ProviderError(
        f"this node is not in a swarm (state: {state or 'unknown'})",
        where="GET /info",
        remedy="docker swarm init, or join as a manager",
    )


def local_of(node: str, answers: Answers) -> Local:
    """The containers of tasks on node `node`, from the local part of the answers.

    Raises:
        ProviderError: a body cannot be used.
    """
    containers = parse(answers.containers, list[schema.Container], "GET /containers/json")
    unready = parse(answers.unready, list[schema.Container], "GET /containers/json")
    gateway = parse(answers.gateway, schema.Network, "GET /networks/docker_gwbridge")
    addresses = {}
    for container, endpoint in gateway.containers.items():
        if found := address_of(endpoint.ipv4_address) or address_of(endpoint.ipv6_address):
            addresses[container] = found
    for container, leg in answers.legs.items():
        if leg.address is not None:
            addresses.setdefault(container, leg.address)
    paused = (c.id for c in containers if c.state == "paused")
    return Local(
        node,
        frozenset(c.id for c in containers),
        frozenset(c.id for c in unready).union(paused),
        addresses,
        {container: leg.why for container, leg in answers.legs.items() if leg.why},
    )


def _address_of_node(text: str) -> Address | None:
    """As `address_of`; none where other nodes cannot call it."""
    address = address_of(text)
    return None if address is None else usable(address)


def _nodes(body: bytes, weights: Mapping[str, int]) -> _Parsed[Node]:
    """`weights`: of nodes before, where not 1."""
    found: list[Node] = []
    problems: list[Problem] = []
    for node in sorted(parse(body, list[schema.Node], "GET /nodes"), key=_by_id):
        name = node.description.hostname or node.id
        weight, wrong = labels.node_weight(name, node.spec.labels or {}, weights.get(node.id, 1))
        problems += wrong
        chosen, wrong = labels.node_address(name, node.spec.labels or {})
        problems += wrong
        # A manager reports 0.0.0.0 as its own status where it was initialised without an address, a leader 127.0.0.1.
        texts = (node.manager_status.addr if node.manager_status else "", node.status.addr)
        address = chosen or next((found_ for text in texts if (found_ := _address_of_node(text)) is not None), None)
        if address is None and node.status.state != "down":
            problems.append(
                Problem(
                    f"node {name}",
                    "Swarm has no address of it that other nodes can call, so its tasks are not reached from them",
                    f"docker node update --label-add {labels.NODE_ADDRESS}=ADDRESS {name}",
                )
            )
        # A new leader calls every node "unknown" until it has called; only "down" is a verdict.
        found.append(Node(node.id, name, address, node.status.state != "down", weight))
    return tuple(found), problems


def _services(
    body: bytes, last: Mapping[str, labels.Accepted]
) -> tuple[tuple[Service, ...], list[Problem], dict[str, labels.Accepted]]:
    """Services with a port in ingress mode, as allocated (Endpoint.Ports); others are no business of the mesh.

    Args:
        last: the last good labels by service id. Returned as well, as they are now.
    """
    found: list[Service] = []
    problems: list[Problem] = []
    accepted: dict[str, labels.Accepted] = {}
    for service in sorted(parse(body, list[schema.Service], "GET /services"), key=_by_id):
        ports = []
        for port in (service.endpoint.ports if service.endpoint else None) or ():
            if port.publish_mode != "ingress" or not port.published_port:
                continue
            where = f"service {service.spec.name}, port {port.published_port}/{port.protocol}"
            if port.protocol not in _PROTOCOLS:
                problems.append(Problem(where, f"protocol {port.protocol} is not served", "tcp and udp are"))
            elif not (0 < port.published_port < 65536 and 0 < port.target_port < 65536):
                problems.append(Problem(where, f"ports are 1 to 65535, target is {port.target_port}"))
            else:
                ports.append(PublishedPort(port.published_port, port.target_port, _PROTOCOLS[port.protocol]))
        if ports:
            options, wrong, accepted[service.id] = labels.service_options(
                service.spec.name, service.spec.labels or {}, last.get(service.id)
            )
            problems += wrong + labels.misplaced(service.spec.name, service.spec.labels or {}, _of_containers(service))
            mode = service.spec.mode
            replicas = mode.replicated.replicas if mode and mode.replicated else None
            found.append(Service(service.id, service.spec.name, tuple(sorted(set(ports))), options, replicas))
    return tuple(found), problems, accepted


def _of_containers(service: schema.Service) -> Mapping[str, str]:
    """Labels that the service's containers get."""
    template = service.spec.task_template
    return (template.container_spec.labels if template and template.container_spec else None) or {}


def _unseen(tasks: Iterable[schema.Task], local: Local) -> dict[str, str]:
    found = {}
    for task in tasks:
        status = task.status.container_status
        if task.node_id == local.node and task.status.state in _RUNNING and status:
            if status.container_id not in local.running:
                found[task.id] = GONE
            elif status.container_id in local.unready:
                found[task.id] = UNREADY
    return found


def _container(task: schema.Task) -> str:
    """The id of the task's container; empty while it has none."""
    return status.container_id if (status := task.status.container_status) else ""


def _backend(given: _Input, before: tuple[_Input, Backend | None] | None) -> Backend | None:
    """The task as a backend, or None while it has nothing that could answer.

    It drains from the moment its desired state leaves `running`, and is gone when its container has ended: the local
    Engine knows that before the swarm does. `before`: an earlier state of the task; a backend that is equal stays the
    same object.
    """
    task, service_name, here = given
    state = task.status.state
    draining = task.desired_state != "running"
    if state not in _RUNNING and (draining or state not in _STARTING):
        return None
    runs, unready, address, unreached = here or (True, False, None, "")
    if not runs:
        return None
    backend = Backend(
        id=task.id,
        service=task.service_id,
        node=task.node_id,
        address=address,
        name=f"{service_name}.{task.slot or task.node_id}",
        intent=Intent.DRAINING if draining else Intent.ACTIVE,
        ready=state in _RUNNING and not unready,
        local=here is not None,
        container=_container(task) if here is not None else "",
        unreached=unreached,
    )
    return before[1] if before is not None and before[1] == backend else backend
