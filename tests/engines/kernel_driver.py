# SPDX-License-Identifier: Apache-2.0
"""A process that holds an engine and does what it is told by lines of JSON: the engine without an agent.

It is the kernel engine, unless the configuration says `engine = "proxy"`.
"""

from __future__ import annotations

import dataclasses
import gc
import ipaddress
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from mesh.datapath.counters import Counters
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


def _shown(counters: Counters) -> dict[str, Any]:
    return dataclasses.asdict(counters) | {"failed": {cause.value: count for cause, count in counters.failed.items()}}


class Served:
    """The process' side."""

    def __init__(self, config: dict[str, Any]) -> None:
        from mesh.config.keys import Config
        from mesh.datapath.base import Applied
        from mesh.datapath.kernel.engine import KernelDatapath

        self.config = Config(**config)
        if self.config.engine == "proxy":
            from mesh.datapath.proxy.engine import ProxyDatapath

            self.engine: Any = ProxyDatapath(self.config, docker_host=True)
        else:
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

    def forget_counters_after(self, seconds: float) -> None:
        """Have the proxy forget counters sooner."""
        from mesh.datapath.proxy import accounting

        accounting.KEEP_COUNTERS = seconds  # type: ignore[misc]

    def proxied(self) -> list[str]:
        """The frontends for which the fallback proxy has counters."""
        proxy = self.engine._fallback._proxy
        return sorted(map(str, proxy.stats().frontends)) if proxy else []

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

    def prove(
        self,
        keys: Sequence[tuple[int, str]],
        nodes: Sequence[str],
        checking: Sequence[str] | None = None,
        known: bool = True,
        own: str = "",
    ) -> None:
        """Prove by these keys (number, secret in hexadecimal), and demand proofs of these nodes; through the tunnel
        prove to `checking`, by default the same. `own`: what the others call this node."""
        from mesh.datapath.proof import Proof

        of = frozenset(ipaddress.ip_address(node) for node in nodes)
        to = of if checking is None else frozenset(ipaddress.ip_address(node) for node in checking)
        secrets = tuple((number, bytes.fromhex(secret)) for number, secret in keys)
        called = ipaddress.ip_address(own) if own else None
        self.engine.prove(Proof(secrets, of, of, tunnel_proving=of, tunnel_checking=to, known=known, own=called))

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
            for name in ("flows", "flows_new", "revnat", "revnat_udp", "revnat_new")
        }

    def networks(self) -> dict[str, list[str]]:
        """The networks that backends have themselves, as published; of those of one address the same."""
        maps = self.engine._opened().maps
        names = {entry.id: key.backend for key, entry in self.applied.backends.items()}
        found: dict[str, set[str]] = {}
        for owner, networks in maps._networks_of.items():
            found.setdefault(names[owner], set()).update(map(str, networks))
        return {name: sorted(networks) for name, networks in found.items()}

    def rule_entries(self) -> int:
        """Source rules in the map, of all frontends."""
        return sum(1 for _ in self.engine._opened().maps._maps["mesh_acl"].rows())

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
            "frontends": {str(f): _shown(c) for f, c in stats.frontends.items()},
            "backends": {k.backend: _shown(c) for (_, k), c in stats.backends.items()},
            "verdicts": dict(stats.verdicts),
            "totals": dict(stats.totals),
        }

    def failures(self) -> dict[str, dict[str, int]]:
        """Flows that failed, by service and cause."""
        names = {front: entry.state.service_name for front, entry in self.applied.frontends.items()}
        found: dict[str, dict[str, int]] = {}
        for frontend, counters in self.engine.stats().frontends.items():
            of = found.setdefault(names.get(frontend, str(frontend)), {})
            for cause, count in counters.failed.items():
                of[cause.value] = of.get(cause.value, 0) + count
        return found

    def explain(self, source: str, port: int, destination: str, to: int, protocol: str = "tcp") -> list[Any]:
        from mesh.model import Flow, Protocol

        addresses = ipaddress.ip_address(source), ipaddress.ip_address(destination)
        flow = Flow(addresses[0], port, addresses[1], to, Protocol[protocol.upper()])
        choice = self.engine.lookup(flow)
        seen = None if choice is None else {"hash": choice.hash, "slot": choice.slot, "owner": choice.owner}
        return [seen, dataclasses.asdict(self.engine.explain(flow))]

    def enforced(self, calls: list[list[Any]]) -> dict[str, Any]:
        """What the maps do, whatever anybody says of them: verdicts of `calls` (source, destination, port, protocol),
        and each frontend's flags and its backends' shares of the slots."""
        from mesh._maglev import SlotTable
        from mesh.model import Flow, Protocol

        maps = self.engine._opened().maps
        names = {entry.id: key.backend for key, entry in self.applied.backends.items()}
        verdicts = []
        for source, destination, port, protocol in calls:
            addresses = ipaddress.ip_address(source), ipaddress.ip_address(destination)
            flow = Flow(addresses[0], 40000, addresses[1], port, Protocol[protocol.upper()])
            verdicts.append(self.engine.explain(flow).verdict.upper())
        shares = {}
        for frontend, served in maps.served.items():
            found = SlotTable.from_slots(maps.read_table(frontend)).shares()
            shares[str(frontend)] = [served.flags, {names.get(owner, "?"): n for owner, n in sorted(found.items())}]
        return {"verdicts": verdicts, "shares": shares}

    def interrupt(self, steps: list[list[dict[str, Any]]], calls: list[list[Any]], at: int) -> dict[str, Any]:
        """In a process of its own: open, carry out all steps and see after each what is enforced. Then begin the last
        but one anew, and end as by kill -9 once it has written for the `at`th time.

        Returns:
            views (of each step), killed (else there are not so many writes).
        """
        self.load_once()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                self.open()
                views = [(self.serve(step), self.enforced(calls))[1] for step in steps]
                os.write(writer, json.dumps(views).encode())
                os.close(writer)
                self.die_at(at)
                self.serve(steps[-2])
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            views = json.loads(pipe.read() or "[]")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, 9):
            raise RuntimeError(f"the process ended with {code}")
        return {"views": views, "killed": code == 9}

    def load_once(self) -> None:
        """Have the processes that are forked from this one open the same loaded programs: loading takes longest."""
        from mesh.datapath.kernel import loader, pins, xdp

        if hasattr(self, "loaded"):
            return
        directory = pins.pin_home(self.config) / pins.CONTRACT
        sizes = {"mesh_flows": self.config.flow_cache, "mesh_revnat": self.config.max_replies}
        self.loaded = loader.load(directory, sizes, xdp.objects(self.config))
        loader.load = lambda *arguments: self.loaded  # type: ignore[assignment]

    def die_at(self, number: int) -> None:
        """End the process once it has written to maps or to the journal so often."""
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)

        parts = self.engine._opened()
        maps = parts.maps
        for holder, names in (
            (maps, ("_ports", "_frontends", "_backends", "_config", "_acl", "_exact", "_addresses")),
            (parts.nodes, ("_nodes", "_paths")),
            (parts.publisher._ids, ("_map",)),
            *((arena, ("slots",)) for arena in maps.arenas._arenas),
        ):
            for name in names:
                setattr(holder, name, Counting(getattr(holder, name), count))
        maps._maps = {name: Counting(each, count) for name, each in maps._maps.items()}
        journal, append = self.engine._journal, self.engine._journal._append_or_write

        def named(*arguments: Any, **change: Any) -> None:
            append(*arguments, **change)
            count()

        journal._append_or_write = named  # type: ignore[method-assign]

    def problems(self) -> list[str]:
        return list(self.engine.problems())

    def missing(self) -> list[str]:
        return list(self.engine.missing())

    def leave(self) -> None:
        self.engine.leave(release=True)

    def close(self, release: bool) -> None:
        self.engine.close(release=release)


class Counting:
    """A map or a mapping that tells of each write, when it is done."""

    WRITES = ("update", "delete", "update_batch", "delete_batch", "write", "store32", "store64")

    def __init__(self, held: Any, count: Callable[[], None]) -> None:
        self._held, self._count = held, count

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._held, name)
        if name not in self.WRITES:
            return found

        def write(*arguments: Any) -> Any:
            done = found(*arguments)
            self._count()
            return done

        return write


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
