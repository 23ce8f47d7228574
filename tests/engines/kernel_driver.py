# SPDX-License-Identifier: Apache-2.0
"""A process that holds a KernelDatapath and does what it is told by lines of JSON: the engine without an agent."""

from __future__ import annotations

import dataclasses
import gc
import ipaddress
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from tests.support.lab.netns import Namespace
from tests.support.polling import PATIENCE

REPOSITORY = Path(__file__).parents[2]


class Driver:
    """The test's side: starts the process in a namespace; `engine.open()` and so on are calls of `Served`."""

    def __init__(self, namespace: Namespace, prefix: tuple[str, ...] = (), **config: object) -> None:
        command = [*prefix, sys.executable, "-m", "tests.engines.kernel_driver", json.dumps(config, default=str)]
        self.process = subprocess.Popen(
            namespace.command(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: object) -> Any:
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps([name, arguments], default=str) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '["error", "the process has ended"]')
            if answer[0] == "error":
                raise RuntimeError(answer[1])
            return answer[1]

        return call

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        self.process.communicate(timeout=PATIENCE)


class Served:
    """The process' side."""

    def __init__(self, config: dict[str, Any]) -> None:
        from mesh.config.keys import Config
        from mesh.datapath.base import Applied
        from mesh.datapath.kernel.engine import KernelDatapath

        self.config = Config(**config)
        self.engine = KernelDatapath(self.config)
        self.applied = Applied()

    def pretend_kernel(self, major: int, minor: int) -> None:
        """Do as on an older kernel."""
        from mesh.datapath.kernel import attach

        attach.kernel_release = lambda: (major, minor)

    def pretend_cards(self) -> None:
        """Take every veth for a network card, as far as XDP is concerned."""
        from mesh.datapath.kernel import xdp

        xdp.CARDS = ("veth",)  # type: ignore[misc, assignment]

    def fail_once(self) -> None:
        """Have the next `open` fail after its threads have started."""
        from mesh.datapath.kernel.network import Network

        follow = Network.follow

        def fails(*_: Any) -> bool:
            Network.follow = follow  # type: ignore[method-assign]
            raise OSError("the network cannot be read")

        Network.follow = fails  # type: ignore[assignment, method-assign]

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def preflight(self) -> str | None:
        from mesh.datapath.kernel.preflight import preflight

        return preflight(self.config)

    def open(self) -> dict[str, Any]:
        self.applied = self.engine.open()
        return {
            "generation": self.applied.generation,
            "frontends": {str(f): e.state.service_name for f, e in self.applied.frontends.items()},
            "backends": {key.backend: entry.id for key, entry in self.applied.backends.items()},
        }

    def again(self, **changes: Any) -> dict[str, Any]:
        """As the next process does, with another configuration."""
        self.engine.close(release=False)
        self.config = dataclasses.replace(self.config, **changes)
        self.engine = type(self.engine)(self.config)
        gc.collect()  # what the one before held open ends with it
        return self.open()

    def serve(self, services: list[dict[str, Any]], nodes: Sequence[str] = ()) -> dict[str, Any]:
        """services: name, published, protocol, backends {name: [address, port, weight]}, options, address, engine,
        unhanded [name] (their node's peer port does not answer).

        A backend whose address is among `nodes` runs there, on a node with this engine (default: kernel).
        """
        from mesh.model import (
            ANY_ADDRESS,
            DesiredState,
            Frontend,
            FrontendState,
            Path,
            Protocol,
            ProxyProtocol,
            ServiceOptions,
            Target,
        )
        from mesh.reconcile.plan import plan

        frontends = {}
        for service in services:
            options = dict(service.get("options", {}))
            for key in ("allow", "deny"):
                if key in options:
                    options[key] = tuple(ipaddress.ip_network(text) for text in options[key])
            proxied = "proxy_protocol" in options
            if proxied:
                options["proxy_protocol"] = ProxyProtocol(options["proxy_protocol"])
            address = ipaddress.ip_address(service["address"]) if "address" in service else ANY_ADDRESS
            frontend = Frontend(address, service["published"], Protocol[service.get("protocol", "tcp").upper()])
            targets = []
            for name, (where, port, weight) in sorted(service["backends"].items()):
                at = ipaddress.ip_address(where)
                away = {"local": False, "node": where, "via": at, "engine": service.get("engine", "kernel")}
                away["handed"] = name not in service.get("unhanded", ())
                away |= {"path": Path.PEER} if proxied else {}
                targets.append(Target(name, at, port, weight, **(away if where in nodes else {})))
            options.setdefault("table_size", 1021)
            chosen, name = ServiceOptions(**options), service["name"]
            frontends[frontend] = FrontendState(frontend, name, name, chosen, tuple(targets), proxied=proxied)
        known = tuple(ipaddress.ip_address(node) for node in nodes)
        step = plan(self.applied, DesiredState(self.applied.generation + 1, frontends, nodes=known))
        self.applied = self.engine.apply(step)
        return {"ids": {key.backend: entry.id for key, entry in self.applied.backends.items()}}

    def work(self, services: list[dict[str, Any]]) -> dict[str, int]:
        """As `serve`; says what that did to maps: system calls, stores to mapped arrays, bytes of these."""
        from mesh._bpf import map_work

        before = map_work()
        self.serve(services)
        counts = (now - was for now, was in zip(map_work(), before, strict=True))
        return dict(zip(("calls", "stores", "bytes"), counts, strict=True))

    def tracked(self) -> int:
        return sum(entry.table.tracked_slots() for entry in self.applied.frontends.values())

    def settle(self, seconds: float) -> dict[str, list[int]]:
        return {str(f): sorted(slots) for f, slots in self.engine.live_slots(seconds).items()}

    def end_transitions(self) -> None:
        """As after a long calm without flows."""
        from mesh.reconcile.plan import settle

        self.applied = self.engine.apply(settle(self.applied, list(self.applied.frontends), {}))

    def entries(self) -> dict[str, int]:
        return {
            name: self.engine._opened().maps.entries(f"mesh_{name}")
            for name in ("flows", "flows_new", "revnat", "revnat_new")
        }

    def forget(self, names: list[str]) -> None:
        """Empty tables of the programs."""
        for name in names:
            held = self.engine._opened().maps._maps[f"mesh_{name}"]
            held.delete_batch(held.dump()[0])

    def ways(self) -> dict[str, int]:
        """MTU of the way to each other node."""
        return {str(address): slot.mtu for address, slot in self.engine._opened().nodes.held.items()}

    def sweep(self, seconds: float) -> int:
        from mesh.datapath.kernel.gc import collect

        return collect(self.engine._opened().maps.reverse, seconds)

    def runs_behind(self, device: str, *, tcx: bool) -> int:
        """How many packets a program behind ours on a device has met so far; the first call attaches it."""
        import socket

        from mesh import _bpf
        from mesh.datapath.kernel.attach import TCX_INGRESS

        if not hasattr(self, "behind"):
            self.counting = _bpf.Statistics()
            self.behind = _bpf.Program.passing()
            index = socket.if_nametoindex(device)
            if tcx:
                self.link = _bpf.Link.create(self.behind, index, TCX_INGRESS)
            else:
                _bpf.tc_attach(self.behind, index, True, 1, 99)
        return self.behind.statistics()[1]

    def stats(self) -> dict[str, Any]:
        stats = self.engine.stats()
        return {
            "frontends": {str(f): dataclasses.asdict(c) | {"failed": {}} for f, c in stats.frontends.items()},
            "backends": {k.backend: dataclasses.asdict(c) | {"failed": {}} for (_, k), c in stats.backends.items()},
            "verdicts": dict(stats.verdicts),
            "totals": dict(stats.totals),
        }

    def explain(self, source: str, port: int, destination: str, to: int, protocol: str = "tcp") -> list[Any]:
        from mesh.model import Flow, Protocol

        addresses = ipaddress.ip_address(source), ipaddress.ip_address(destination)
        flow = Flow(addresses[0], port, addresses[1], to, Protocol[protocol.upper()])
        choice = self.engine.lookup(flow)
        seen = None if choice is None else {"hash": choice.hash, "slot": choice.slot, "owner": choice.owner}
        return [seen, dataclasses.asdict(self.engine.explain(flow))]

    def problems(self) -> list[str]:
        return list(self.engine.problems())

    def missing(self) -> list[str]:
        return list(self.engine.missing())

    def close(self, release: bool) -> None:
        self.engine.close(release=release)


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    served = Served(json.loads(sys.argv[1]))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = ["ok", getattr(served, name)(**arguments)]
        except Exception as error:  # the test sees it
            answer = ["error", f"{type(error).__name__}: {error}"]
        print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main()
