# SPDX-License-Identifier: Apache-2.0
"""What an Engine answers for the things of a simulated swarm, with the fields, and so the size, of real answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

FIRST_PORT: Final = 10000
NETWORK: Final = "n" * 25


def ident(kind: str, number: int) -> str:
    """25 characters, as swarm's ids have."""
    return f"{kind}{number:024d}"


@dataclass
class Task:
    """A task in one slot of a service."""

    number: int
    service: int
    slot: int
    node: int
    state: str = "running"
    desired: str = "running"
    body: bytes = b""

    @property
    def id(self) -> str:
        return ident("t", self.number)

    @property
    def container(self) -> str:
        return f"{self.number:064x}"


NETWORK_BODY: Final = {
    "ID": NETWORK,
    "Version": {"Index": 7},
    "CreatedAt": "2026-01-01T00:00:00.000000000Z",
    "UpdatedAt": "2026-01-01T00:00:00.000000000Z",
    "Spec": {
        "Name": "ingress",
        "Labels": {},
        "DriverConfiguration": {},
        "Ingress": True,
        "IPAMOptions": {"Driver": {}, "Configs": [{"Subnet": "10.0.0.0/8", "Gateway": "10.0.0.1"}]},
        "Scope": "swarm",
    },
    "DriverState": {"Name": "overlay", "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4096"}},
    "IPAMOptions": {"Driver": {"Name": "default"}, "Configs": [{"Subnet": "10.0.0.0/8", "Gateway": "10.0.0.1"}]},
}


def task_body(task: Task) -> bytes:
    """One of GET /tasks."""
    stamp = "2026-01-01T00:00:00.000000000Z"
    port = {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": FIRST_PORT + task.service, "PublishMode": "ingress"}
    spec = {
        "Image": f"registry.example/web:1@sha256:{'0' * 64}",
        "Labels": {"com.docker.stack.namespace": "shop"},
        "Env": ["MODE=production", "LOG=info", "DATABASE=db.internal:5432"],
        "Privileges": {"CredentialSpec": None, "SELinuxContext": None},
        "Isolation": "default",
    }
    row = {
        "ID": task.id,
        "Version": {"Index": 1000 + task.number},
        "CreatedAt": stamp,
        "UpdatedAt": stamp,
        "Labels": {},
        "Spec": {
            "ContainerSpec": spec,
            "Resources": {"Limits": {"MemoryBytes": 536870912}, "Reservations": {}},
            "RestartPolicy": {"Condition": "any", "Delay": 5000000000, "MaxAttempts": 0},
            "Placement": {"Platforms": [{"Architecture": "amd64", "OS": "linux"}]},
            "Networks": [{"Target": NETWORK}],
            "ForceUpdate": 0,
        },
        "ServiceID": ident("s", task.service),
        "Slot": task.slot,
        "NodeID": ident("n", task.node),
        "Status": {
            "Timestamp": stamp,
            "State": task.state,
            "Message": "started",
            "ContainerStatus": {"ContainerID": task.container, "PID": 1000 + task.number, "ExitCode": 0},
            "PortStatus": {"Ports": [port]},
        },
        "DesiredState": task.desired,
        "NetworksAttachments": [{"Network": NETWORK_BODY, "Addresses": ["10.0.0.3/8"]}] * 2,
    }
    return json.dumps(row, separators=(",", ":")).encode()


def field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message with its length: bytes, a string or a message (protobuf's encoding document)."""
    size, head = len(value), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + value


def frame(message: bytes, flag: int = 0) -> bytes:
    """A message as gRPC has it on the wire (PROTOCOL-HTTP2.md). `flag`: whether it is compressed."""
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def watch_message(task: Task) -> bytes:
    """What Watch says of its change, as a gRPC message: WatchMessage{events: {action, object: {task}}}."""
    about = field(1, task.id.encode()) + field(3, bytes(900)) + field(4, ident("s", task.service).encode())
    event = b"\x08\x02" + field(2, field(4, about))
    return frame(field(1, event))


def service_body(number: int, replicas: int) -> dict[str, Any]:
    port = {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": FIRST_PORT + number, "PublishMode": "ingress"}
    spec = {
        "Name": f"shop_web{number}",
        "Labels": {"com.docker.stack.image": "registry.example/web:1", "com.docker.stack.namespace": "shop"},
        "TaskTemplate": {"ContainerSpec": {"Image": "registry.example/web:1", "Env": ["MODE=production"]}},
        "Mode": {"Replicated": {"Replicas": replicas}},
        "UpdateConfig": {"Parallelism": 1, "FailureAction": "pause", "Order": "start-first"},
        "EndpointSpec": {"Mode": "vip", "Ports": [port]},
    }
    endpoint = {
        "Spec": spec["EndpointSpec"],
        "Ports": [port],
        "VirtualIPs": [{"NetworkID": NETWORK, "Addr": "10.0.0.2/8"}],
    }
    return {"ID": ident("s", number), "Version": {"Index": 9}, "Spec": spec, "PreviousSpec": spec, "Endpoint": endpoint}


def node_body(number: int, address: str) -> dict[str, Any]:
    plugins = [{"Type": kind, "Name": f"driver{i}"} for i in range(5) for kind in ("Log", "Network", "Volume")]
    resources = {"NanoCPUs": 16000000000, "MemoryBytes": 67108864000}
    engine = {"EngineVersion": "20.10.24", "Plugins": plugins}
    description = {"Hostname": f"host{number}", "Platform": {"Architecture": "x86_64"}, "Resources": resources}
    return {
        "ID": ident("n", number),
        "Version": {"Index": 5},
        "Spec": {"Labels": {}, "Role": "worker", "Availability": "active"},
        "Description": {**description, "Engine": engine, "TLSInfo": {"TrustRoot": "-" * 700}},
        "Status": {"State": "ready", "Addr": address},
    }
