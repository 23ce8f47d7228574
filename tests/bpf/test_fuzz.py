# SPDX-License-Identifier: Apache-2.0
"""Random and mutated packets through the programs and through the model in plain Python: equal verdicts, equal bytes.

MESH_FUZZ_PACKETS sets how many (a sample by default, `make fuzz` takes a million), MESH_FUZZ_SEED from which seed.
"""

from __future__ import annotations

import ipaddress
import os
import random
from collections import Counter
from typing import Any

import pytest

from mesh._abi import SETTING_GUARD
from mesh.netaddr import prefix_length
from tests.bpf.packets import BACKENDS, EXACT, NODE4, NODE6, Packets
from tests.bpf.plane import (
    ACTIVE,
    ALLOW_RULE,
    CLIENT,
    DENY,
    DENY_RULE,
    DRAINING,
    FREE,
    HAIRPIN,
    HAIRPIN6,
    HOLD,
    PASS_IF_NONE,
    TRACKED,
    Plane,
    packed,
    steady_stamp,
)
from tests.oracle import state as model
from tests.oracle.frames import TCP, UDP
from tests.oracle.packets import Model
from tests.oracle.state import Outcome, same

# Elsewhere, since fragments that were kept come in again.
pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.timeout(1800), pytest.mark.usefixtures("elsewhere")]

PACKETS = int(os.environ.get("MESH_FUZZ_PACKETS", "40000"))
SEED = int(os.environ.get("MESH_FUZZ_SEED", "1"))
ROUND = 2000  # packets between changes of the configuration
# number, port, protocol, owners, flags, acl
FRONTENDS = [
    (1, 80, TCP, (10, 11, 12), 0, 0),
    (2, 53, UDP, (20, 21, 22), 0, 0),
    (3, 81, TCP, (13, 14, 15), 0, 0),
    (4, 54, UDP, (23, 24, 25), 0, 0),
    (5, 86, TCP, (30, 31, 32), 0, 0),
    (6, 56, UDP, (40, 41, 42), HOLD, 0),
    (7, 82, TCP, (), 0, 0),
    (8, 83, TCP, (), PASS_IF_NONE, 0),
    (9, 84, UDP, (), 0, 0),
    (10, 80, TCP, (16, 17), CLIENT, 0),
    (11, 85, TCP, (18, 19), CLIENT | DENY, 7),
    (12, 57, UDP, (26, 27), HOLD, 0),
]
CHANGING = {3, 4, 6, 11, 12}


class Twin:
    """The programs and the model, configured alike."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.plane = Plane.fresh()
        self.model = Model(packed(HAIRPIN), packed(HAIRPIN6), clock=steady_stamp)
        self.seen = Counter[str]()
        self.plane.local(NODE4, NODE6)
        self.model.addresses = {packed(NODE4), packed(NODE6)}
        for owner in BACKENDS:
            self.backend(owner, ACTIVE, 1)
        for number, *_ in FRONTENDS:
            self.frontend(number)
        for network, rule in (("198.51.100.0/24", ALLOW_RULE), ("198.51.100.200/31", DENY_RULE)):
            self.plane.rule(7, network, rule)
            address, bits = network.split("/")
            self.model.rules.setdefault(7, []).append((96 + int(bits), packed(address), rule == ALLOW_RULE))

    def backend(self, owner: int, state: int, epoch: int) -> None:
        address, port, protocol = BACKENDS[owner]
        own, gateway = ("fd00::99/128", "fd00::1") if ":" in address else ("203.0.113.0/28", "172.18.0.1")
        networks = [own] if owner % 3 == 0 else []
        more: dict[str, Any] = {"networks": networks, "source": gateway, "bridge": 2}
        self.plane.backend(owner, address, port, protocol=protocol, state=state, epoch=epoch, **more)
        net = [ipaddress.ip_network(network) for network in networks]
        has = [(prefix_length(n), packed(str(n.network_address))) for n in net]
        self.model.backends[owner] = model.Backend(packed(address), port, state, epoch, has, packed(gateway))

    def frontend(self, number: int) -> None:
        _, port, protocol, owners, flags, acl = next(f for f in FRONTENDS if f[0] == number)
        slots = []
        for _ in range(13):
            current = self.random.choice(owners) if owners else 0
            previous = current
            if number in CHANGING and self.random.random() < 0.7:
                current = self.random.choice((*owners, *owners, 0, 1))
                previous = self.random.choice((*owners, *owners, 0, 1)) | TRACKED
            slots.append((current, previous))
        address = EXACT if number == 10 else "::"
        self.plane.frontend(number, port, slots, protocol=protocol, flags=flags, acl=acl, address=address)
        self.model.frontends[number] = model.Frontend(slots, flags, acl)
        if number == 10:
            self.model.exact[packed(EXACT), port, protocol] = number
        else:
            self.model.any_address[protocol, port] = number

    def change(self) -> None:
        """A step of configuration between packets."""
        for number in CHANGING:
            if self.random.random() < 0.3:
                self.frontend(number)
        for owner in self.random.sample(sorted(BACKENDS), 4):
            state = self.random.choice((ACTIVE, ACTIVE, DRAINING, FREE))
            self.backend(owner, state, self.model.backends[owner].epoch + self.random.randrange(2))
        self.model.guarded = self.random.random() < 0.5
        self.plane.configure(settings=SETTING_GUARD * self.model.guarded)
        orphaned_for = self.random.choice((-900, -900, 10, 1000))  # far from where the answer changes
        self.plane.orphan(orphaned_for)
        self.model.now, self.model.orphan_at = 10**6, 10**6 - orphaned_for

    def run(self, program: str, frame: bytes) -> Outcome:
        """One frame through both; the model's outcome."""
        expected = self.model.ingress(frame) if program == "mesh_ingress" else self.model.task(frame)
        out = self.plane.run(program, frame)
        self.seen[expected.verdict] += 1
        assert same(expected, out.retval, out.data), (
            f"{program} {frame.hex()}\nexpected {expected.action} {expected.verdict} "
            f"{(expected.frame or b'').hex()}\ngot {out.retval} {out.data.hex()}"
        )
        return expected


def test_random_packets_meet_what_the_model_says() -> None:
    twin = Twin(SEED)
    packets = Packets(twin.random)
    for count in range(PACKETS):
        if count % ROUND == ROUND - 1:
            counted = Counter({name: n for name, n in twin.seen.items() if name})
            assert Counter(twin.plane.verdicts()) == counted
            assert twin.plane.failures() == twin.model.failures
            twin.change()
        program, frame = packets.next()
        packets.remember(twin.run(program, frame))
    assert twin.plane.failures() == twin.model.failures
    missing = set(twin.plane.verdicts()) ^ {name for name in twin.seen if name}
    assert not missing
    if PACKETS >= 40000:
        expected = {"FORWARD", "NOTED", "STARTED", "KEPT", "MOVED", "PASS", "REPLY", "ICMP_IN", "ICMP_OUT", "DENIED",
                    "REJECTED", "NO_BACKEND", "FRAGMENT", "EARLY", "FAMILY", "EXTENSION", "MALFORMED", "EXPIRED",
                    "RESET_HELD", "TRANSLATED"}  # fmt: skip
        assert expected <= set(twin.seen), twin.seen
        causes = {"DENIED", "NO_BACKEND", "REFUSED", "UNANSWERED"}
        assert causes <= {cause for _, cause in twin.model.failures}, twin.model.failures
