# SPDX-License-Identifier: Apache-2.0
"""Messages and journals of build 2480956: this build reads them, and that build reads what this one writes.

The bytes were recorded with that build. They are never recorded anew: what they stand for is written beside them, with
every default spelled out, so that a changed default, which would change the meaning of an absent field, is found here.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh._maglev import SlotTable
from mesh.cluster import wire
from mesh.cluster.translate import Incoming, Outgoing
from mesh.datapath.base import Applied, BackendEntry, BackendKey, FrontendEntry, Plan
from mesh.datapath.kernel.journal import Journal, Names
from mesh.model import (
    ANY_ADDRESS,
    Affinity,
    Backend,
    EngineKind,
    Frontend,
    FrontendState,
    HealthCheck,
    Intent,
    Inventory,
    Locality,
    Node,
    ProbeKind,
    Problem,
    Protocol,
    ProxyProtocol,
    PublishedPort,
    Service,
    ServiceOptions,
    Severity,
    Target,
)
from mesh.options import from_compact, to_compact

MESSAGES = {
    "hello": ("85a474797065a568656c6c6fa776657273696f6e02a66f6c6465737401a46d657368a3302e31a6656e67696e65a570726f7879"),
    "snapshot": (
        "83a474797065a8736e617073686f74aa67656e65726174696f6e07a7636f6e74656e7484a8736572766963657382a2733184"
        "a26964a27331a46e616d65a3776562a5706f7274739294cd1f405006a23a3a9435cd14e911a93139322e302e322e39a76f70"
        "74696f6e7381a66865616c746896a3746370a12fcb4000000000000000cb3ff00000000000000203a2733284a26964a27332"
        "a46e616d65a3616c6ca5706f7274739194cd1f415106a23a3aa76f7074696f6e7388a8616666696e697479a9636c69656e74"
        "2d6970ae70726f78795f70726f746f636f6ca27632aa7461626c655f73697a65ce00010001a86c6f63616c697479ab6c6f63"
        "616c2d6669727374a5616c6c6f7792aa31302e302e302e302f38ad323030313a6462383a3a2f3332a464656e7991ab31302e"
        "312e302e302f3136a66865616c746896a468747470a62f7265616479cb3fe0000000000000cb3fd00000000000000405a665"
        "6e61626c65c2a86261636b656e647382a2623184a26964a26231a773657276696365a27331a46e6f6465a26e31a46e616d65"
        "a57765622e31a2623288a26964a26232a773657276696365a27332a46e6f6465a26e32a46e616d65a5616c6c2e31a6776569"
        "67687403a8647261696e696e67c3a57265616479c2a9636f6e7461696e6572a26332a56e6f64657382a26e3183a26964a26e"
        "31a46e616d65a36f6e65a761646472657373a93139322e302e322e31a26e3286a26964a26e32a46e616d65a374776fa76164"
        "6472657373ab323030313a6462383a3a32a27570c2a677656967687400a6656e67696e65a66b65726e656ca8766572646963"
        "747382a2623192a27570a0a2623292a4646f776ea772656675736564"
    ),
    "delta": (
        "84a474797065a564656c7461a46261736506aa67656e65726174696f6e07a370757484a8736572766963657381a2733284a2"
        "6964a27332a46e616d65a3616c6ca5706f7274739194cd1f415106a23a3aa76f7074696f6e7388a8616666696e697479a963"
        "6c69656e742d6970ae70726f78795f70726f746f636f6ca27632aa7461626c655f73697a65ce00010001a86c6f63616c6974"
        "79ab6c6f63616c2d6669727374a5616c6c6f7792aa31302e302e302e302f38ad323030313a6462383a3a2f3332a464656e79"
        "91ab31302e312e302e302f3136a66865616c746896a468747470a62f7265616479cb3fe0000000000000cb3fd00000000000"
        "000405a6656e61626c65c2a86261636b656e647381a2623288a26964a26232a773657276696365a27332a46e6f6465a26e32"
        "a46e616d65a5616c6c2e31a677656967687403a8647261696e696e67c3a57265616479c2a9636f6e7461696e6572a26332a5"
        "6e6f64657381a26e3286a26964a26e32a46e616d65a374776fa761646472657373ab323030313a6462383a3a32a27570c2a6"
        "77656967687400a6656e67696e65a66b65726e656ca8766572646963747382a2623192a27570a0a2623292a4646f776ea772"
        "656675736564"
    ),
    "back": (
        "88a474797065a564656c7461a46261736507aa67656e65726174696f6e08a370757484a8736572766963657380a86261636b"
        "656e647380a56e6f64657380a8766572646963747380ad64726f705f736572766963657391a27332ad64726f705f6261636b"
        "656e647391a26232aa64726f705f6e6f64657391a26e32ad64726f705f766572646963747392a26231a26232"
    ),
    "report": (
        "87a474797065a67265706f7274a8766572646963747381a2623192a27570a0a76469676573747381aa2a3a383030302f7463"
        "70a461623132aa67656e65726174696f6e07a6656e67696e65a66b65726e656ca76368616e676573c3a57265616473c3"
    ),
    "subscribe": ("81a474797065a9737562736372696265"),
}
JOURNAL = (
    r'{"version":3,"generation":4,"backends":[[2,"b1",80,6,["b1","10.0.0.5",80,2,true,"n1","c1","",""]]],"'
    r'frontends":[{"frontend":["192.0.2.9",53,17],"service":["s1","web"],"options":{"enable":true,"affinit'
    r'y":"flow","proxy_protocol":"off","health":["tcp","/",2.0,1.0,2,3],"table_size":16381,"locality":"clu'
    r'ster","allow":[],"deny":[]},"targets":[],"panic":false}],"nodes":[]}'
    "\n"
    r'{"generation":5,"backends":[[3,"b2",80,6,["b2","2001:db8::2",80,0,false,"n2","","2001:db8::2","kerne'
    r'l"]]],"frontends":[{"frontend":["::",8001,6],"service":["s2","all"],"options":{"enable":false,"affin'
    r'ity":"client-ip","proxy_protocol":"v2","health":["http","/ready",0.5,0.25,4,5],"table_size":65537,"l'
    r'ocality":"local-first","allow":["10.0.0.0/8","2001:db8::/32"],"deny":["10.1.0.0/16"]},"targets":[["b'
    r'1","10.0.0.5",80,2,true,"n1","c1","",""],["b2","2001:db8::2",80,0,false,"n2","","2001:db8::2","kerne'
    r'l"]],"panic":true}],"gone_backends":[],"gone_frontends":[],"nodes":["192.0.2.1"]}'
    "\n"
)
DEFAULTS = ServiceOptions(
    enable=True,
    affinity=Affinity.FLOW,
    proxy_protocol=ProxyProtocol.OFF,
    health=HealthCheck(ProbeKind.TCP, "/", 2.0, 1.0, 2, 3),
    table_size=16381,
    locality=Locality.CLUSTER,
    allow=(),
    deny=(),
)
OTHERS = ServiceOptions(
    enable=False,
    affinity=Affinity.CLIENT_IP,
    proxy_protocol=ProxyProtocol.V2,
    health=HealthCheck(ProbeKind.HTTP, "/ready", 0.5, 0.25, 4, 5),
    table_size=65537,
    locality=Locality.LOCAL_FIRST,
    allow=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
    deny=(ip_network("10.1.0.0/16"),),
)
WEB = (
    PublishedPort(8000, 80, Protocol.TCP, ANY_ADDRESS),
    PublishedPort(53, 5353, Protocol.UDP, ip_address("192.0.2.9")),
)
INVENTORY = Inventory(
    (
        Service("s1", "web", WEB, DEFAULTS),
        Service("s2", "all", (PublishedPort(8001, 81, Protocol.TCP, ANY_ADDRESS),), OTHERS),
    ),
    (
        Backend("b1", "s1", "n1", None, "web.1", 1, Intent.ACTIVE, True, False, ""),
        Backend("b2", "s2", "n2", None, "all.1", 3, Intent.DRAINING, False, False, "c2"),
    ),
    (
        Node("n1", "one", ip_address("192.0.2.1"), True, 1, EngineKind.UNKNOWN),
        Node("n2", "two", ip_address("2001:db8::2"), False, 0, EngineKind.KERNEL),
    ),
    source="relay",
)


class OldOptions(msgspec.Struct, frozen=True):
    """Service options as build 2480956 reads them off the wire."""

    affinity: str = "flow"
    proxy_protocol: str = "off"
    table_size: int = 16381
    locality: str = "cluster"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    health: tuple[str, str, float, float, int, int] = ("tcp", "/", 2.0, 1.0, 2, 3)
    enable: bool = True


class OldService(msgspec.Struct, frozen=True):
    id: str
    name: str
    ports: tuple[tuple[int, int, int, str], ...]
    options: OldOptions = OldOptions()


class OldBackend(msgspec.Struct, frozen=True):
    id: str
    service: str
    node: str
    name: str = ""
    weight: int = 1
    draining: bool = False
    ready: bool = True
    container: str = ""


class OldNode(msgspec.Struct, frozen=True):
    id: str
    name: str
    address: str = ""
    up: bool = True
    weight: int = 1
    engine: str = ""


class OldContent(msgspec.Struct, frozen=True):
    services: dict[str, OldService] = {}
    backends: dict[str, OldBackend] = {}
    nodes: dict[str, OldNode] = {}
    verdicts: dict[str, tuple[str, str]] = {}


class OldHello(msgspec.Struct, tag="hello", frozen=True):
    version: int
    oldest: int
    mesh: str
    engine: str = ""


class OldSnapshot(msgspec.Struct, tag="snapshot", frozen=True):
    generation: int
    content: OldContent


class OldDelta(msgspec.Struct, tag="delta", frozen=True):
    base: int
    generation: int
    put: OldContent
    drop_services: tuple[str, ...] = ()
    drop_backends: tuple[str, ...] = ()
    drop_nodes: tuple[str, ...] = ()
    drop_verdicts: tuple[str, ...] = ()


class OldReport(msgspec.Struct, tag="report", frozen=True):
    verdicts: dict[str, tuple[str, str]]
    digests: dict[str, str] = {}
    generation: int = 0
    engine: str = ""
    changes: bool = False
    reads: bool = False


class OldSubscribe(msgspec.Struct, tag="subscribe", frozen=True):
    pass


def recorded(name: str) -> bytes:
    return bytes.fromhex(MESSAGES[name])


def old_reader(data: bytes) -> Any:
    """What build 2480956 reads in a message."""
    kinds = OldHello | OldSnapshot | OldDelta | OldReport | OldSubscribe
    return msgspec.msgpack.decode(data, type=kinds)


def test_an_old_snapshot_is_read() -> None:
    snapshot = wire.decode(recorded("snapshot"))
    assert isinstance(snapshot, wire.Snapshot) and snapshot.generation == 7
    assert Incoming().inventory(snapshot.content) == INVENTORY
    assert {key: (said.health, said.reason) for key, said in snapshot.content.verdicts.items()} == {
        "b1": ("up", ""),
        "b2": ("down", "refused"),
    }


def test_an_old_delta_leads_back() -> None:
    snapshot, back = wire.decode(recorded("snapshot")), wire.decode(recorded("back"))
    assert isinstance(snapshot, wire.Snapshot) and isinstance(back, wire.Delta)
    left = Incoming().inventory(wire.patch(snapshot, back).content)
    first = (INVENTORY.services[:1], INVENTORY.backends[:1], INVENTORY.nodes[:1])
    assert (left.services, left.backends, left.nodes) == first


def test_an_old_report_and_greeting_are_read() -> None:
    report, hello = wire.decode(recorded("report")), wire.decode(recorded("hello"))
    assert isinstance(report, wire.Report) and isinstance(hello, wire.Hello)
    wire.check_version(hello)
    assert (report.digests, report.generation, report.engine) == ({"*:8000/tcp": "ab12"}, 7, "kernel")
    assert (report.verdicts["b1"].health, report.changes, report.reads) == ("up", True, True)


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_message_that_is_passed_on_says_the_same_to_the_old_build(name: str) -> None:
    assert old_reader(wire.encode(wire.decode(recorded(name)))) == old_reader(recorded(name))


def test_an_inventory_of_this_build_is_read_by_the_old_one() -> None:
    snapshot = wire.decode(recorded("snapshot"))
    assert isinstance(snapshot, wire.Snapshot)
    content = Outgoing().content(INVENTORY, snapshot.content.verdicts)
    assert old_reader(wire.encode(wire.Snapshot(7, content))) == old_reader(recorded("snapshot"))
    base = wire.Snapshot(6, wire.Content())
    put = old_reader(wire.encode(wire.diff(base, wire.Snapshot(7, content)))).put
    assert put == old_reader(recorded("snapshot")).content


def test_what_the_old_build_does_not_know_is_ignored_by_it() -> None:
    """Problems with labels, drains of all nodes, and how nodes follow them."""
    snapshot = wire.decode(recorded("snapshot"))
    assert isinstance(snapshot, wire.Snapshot)
    problem = Problem("service web, label mesh.allow", "is empty", severity=Severity.CRITICAL)
    content = Outgoing().content(replace(INVENTORY, problems=(problem,)), snapshot.content.verdicts)
    drains, followers = {"node:n1": wire.Drain(5, True)}, {"n1": wire.Follower("ab", {"node:n1": 3})}
    content = msgspec.structs.replace(content, drains=drains, followers=followers)
    now = wire.Snapshot(7, content)
    assert old_reader(wire.encode(now)) == old_reader(recorded("snapshot"))
    passed = wire.decode(wire.encode(wire.diff(wire.Snapshot(6, wire.Content()), now)))
    assert isinstance(passed, wire.Delta)
    assert old_reader(wire.encode(passed)).put == old_reader(recorded("snapshot")).content
    assert wire.patch(wire.Snapshot(6, wire.Content()), passed) == now
    assert Incoming().inventory(content).problems == (problem,)
    report = wire.Report({}, {}, 7, "kernel", drains=drains, follower=followers["n1"])
    assert old_reader(wire.encode(report)) == OldReport({}, {}, 7, "kernel")
    back = wire.diff(now, wire.Snapshot(8, wire.Content()))
    gone = (back.drop_problems, back.drop_drains, back.drop_followers)
    assert gone == (("service web, label mesh.allow: is empty",), ("node:n1",), ("n1",))


def test_a_report_of_the_old_build_says_nothing_of_drains() -> None:
    report = wire.decode(recorded("report"))
    assert isinstance(report, wire.Report) and report.drains is None


def test_a_field_that_is_absent_means_what_it_meant() -> None:
    """A default is part of the protocol: whoever changes one has to send it, and to raise `wire.VERSION`."""
    assert from_compact({}) == ServiceOptions() == DEFAULTS
    assert to_compact(DEFAULTS) == {}
    assert msgspec.convert(to_compact(DEFAULTS, whole=True), OldOptions) == OldOptions()


def test_options_of_a_newer_build_are_read_as_far_as_they_are_known() -> None:
    more = to_compact(OTHERS) | {"pacing": 5, "health.threshold": 2}
    assert from_compact(more) == OTHERS
    assert msgspec.convert(more, OldOptions) == msgspec.convert(to_compact(OTHERS), OldOptions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"affinity": "sticky"}, "sticky"),
        ({"allow": ["10.0.0.0/33"]}, "10.0.0.0/33"),
        ({"deny": [7]}, "deny"),
        ({"health": ["tcp", "/", 2.0, 1.0, 2]}, "kind, path, interval"),
        ({"health": 7}, "kind, path, interval"),
        ({"health": ["tcp", "/", "x", 1.0, 2, 3]}, "health.interval"),
        ({"table_size": 7}, "table size 7"),
        ({"enable": "yes"}, "enable"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(wire.WireError, match=said):
        Incoming().inventory(wire.Content(services={"s": wire.WireService("s", "s", (), options)}))


def steps() -> list[tuple[Plan, Applied]]:
    """What was written to the recorded journal."""
    here = Target("b1", ip_address("10.0.0.5"), 80, 2, True, "n1", "c1")
    far = ip_address("2001:db8::2")
    away = Target("b2", far, 80, 0, False, "n2", "", far, EngineKind.KERNEL)
    entries = (BackendEntry(2, BackendKey("b1", 80, 6), here), BackendEntry(3, BackendKey("b2", 80, 6), away))
    states = (
        FrontendState(Frontend(ip_address("192.0.2.9"), 53, Protocol.UDP), "s1", "web", DEFAULTS),
        FrontendState(Frontend(ANY_ADDRESS, 8001, Protocol.TCP), "s2", "all", OTHERS, (here, away), True),
    )
    table = SlotTable.uniform(1021, 2)
    fronts = [FrontendEntry(state, table, ids) for state, ids in zip(states, ((2,), (2, 3)), strict=True)]
    return [
        (Plan(4, put_backends=entries[:1], put_frontends=(fronts[0],)), Applied(3)),
        (
            Plan(5, put_backends=entries[1:], put_frontends=(fronts[1],), put_nodes=(ip_address("192.0.2.1"),)),
            Applied(4),
        ),
    ]


def test_an_old_journal_is_read(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(JOURNAL)
    plans = [plan for plan, _ in steps()]
    assert Journal(tmp_path / "names.json").read() == Names(
        5,
        {entry.id: entry for plan in plans for entry in plan.put_backends},
        {entry.state.frontend: entry.state for plan in plans for entry in plan.put_frontends},
        (ip_address("192.0.2.1"),),
    )


def known_to_the_old_build(journal: str) -> str:
    """A journal without the options of later builds, which the old build ignores."""
    rows = [msgspec.json.decode(line) for line in journal.splitlines()]
    for frontend in (frontend for row in rows for frontend in row["frontends"]):
        options, known = frontend["options"], OldOptions.__struct_fields__
        frontend["options"] = {name: value for name, value in options.items() if name in known}
    return "".join(msgspec.json.encode(row).decode() + "\n" for row in rows)


def test_options_of_later_builds_are_left_out_and_nothing_else() -> None:
    more = JOURNAL.replace('"deny":[]', '"deny":[],"pacing":5,"health.threshold":2.5')
    assert more != JOURNAL and known_to_the_old_build(more) == known_to_the_old_build(JOURNAL) == JOURNAL


def test_a_journal_is_written_as_the_old_build_wrote_it(tmp_path: Path) -> None:
    """To the byte, apart from options that came later: the old build reads it after a downgrade."""
    journal = Journal(tmp_path / "names.json")
    for plan, held in steps():
        journal.put(plan, held)
    assert known_to_the_old_build((tmp_path / "names.json").read_text()) == JOURNAL


@pytest.mark.parametrize(
    "change", [('"flow"', '"sticky"'), ('"tcp","/",', ""), ("16381", "7"), ('"allow":[]', '"allow":7')]
)
def test_a_journal_with_unusable_options_tells_nothing(tmp_path: Path, change: tuple[str, str]) -> None:
    text = JOURNAL.replace(*change)
    assert text != JOURNAL
    (tmp_path / "names.json").write_text(text)
    assert Journal(tmp_path / "names.json").read() == Names()
