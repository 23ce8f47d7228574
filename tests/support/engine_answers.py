# SPDX-License-Identifier: Apache-2.0
"""What the Docker Engine API answers and announces, as small as a test needs it."""

from __future__ import annotations

import json
from typing import Any

from mesh.providers.swarm import schema
from mesh.providers.swarm.decode import TASK_LABEL, Answers

INFO = {"Name": "n1", "Swarm": {"NodeID": "node1", "LocalNodeState": "active", "ControlAvailable": True}}


def service(**changes: Any) -> dict[str, Any]:
    port = {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8000, "PublishMode": "ingress"}
    return {"ID": "s1", "Spec": {"Name": "web", "Labels": {}}, "Endpoint": {"Ports": [port]}} | changes


def task(identity: str, state: str = "running", desired: str = "running", node: str = "node1") -> dict[str, Any]:
    status = {"State": state, "ContainerStatus": {"ContainerID": f"c-{identity}"}}
    return {"ID": identity, "ServiceID": "s1", "NodeID": node, "Slot": 1, "Status": status, "DesiredState": desired}


def answers(
    services: Any = None, tasks: Any = (), nodes: Any = (), running: Any = (), unready: Any = (), info: Any = None
) -> Answers:
    attached = {c: {"IPv4Address": f"172.18.0.{n}/16"} for n, c in enumerate(running, 2)}
    parts = (
        INFO if info is None else info,
        [service()] if services is None else services,
        list(tasks),
        list(nodes),
        [{"Id": c} for c in running],
        [{"Id": c} for c in unready],
        {"Name": "docker_gwbridge", "Containers": attached | {"ingress-sbox": {"IPv4Address": "172.18.0.99/16"}}},
    )
    return Answers(*(json.dumps(p).encode() for p in parts))


def event(action: str, container: str = "c-t1", **attributes: str) -> schema.Event:
    return schema.Event("container", action, schema.Actor(container, {TASK_LABEL: "t1"} | attributes))
