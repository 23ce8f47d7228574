# SPDX-License-Identifier: Apache-2.0
"""Plain-Python oracle of docs/HASHING.md: flow hash, slot choice, Maglev tables, slot transitions. Stdlib only.

Written from the document, not from the code it judges: whole-table loops become generators, in-place updates become
sets and dictionaries. Slow and obvious. `python -m tests.oracle.selection` prints the golden vectors.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from typing import Any

NONE, PASS, FIRST = 0, 1, 2
TRACKED = 1 << 31
REMEMBERED = 3  # owners a slot remembers besides its current and its previous one

Backend = tuple[bytes, int, int]  # seed, owner, weight

MASK32, MASK64 = 2**32 - 1, 2**64 - 1
PI_WORDS = (0x243F6A8885A308D3, 0x13198A2E03707345, 0xA4093822299F31D1, 0x082EFA98EC4E6C89, 0x452821E638D01377)
SEED = 0xBE5466CF34E90C6D


def address(text: str) -> bytes:
    """16 bytes of an address in text, IPv4 as IPv4-mapped IPv6."""
    ip = ipaddress.ip_address(text)
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed


def murmur_finaliser(value: int) -> int:
    """MurmurHash3's fmix64."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = ((value ^ (value >> 33)) * factor) & MASK64
    return value ^ (value >> 33)


def address_word(addr: bytes, high_key: int, low_key: int) -> int:
    high, low = int.from_bytes(addr[:8], "big"), int.from_bytes(addr[8:], "big")
    return (((high ^ low_key) * high_key) & MASK64) ^ (((low ^ high_key) * low_key) & MASK64)


def flow_hash(source: bytes, source_port: int, destination: bytes, destination_port: int, protocol: int) -> int:
    """32-bit hash of a 5-tuple."""
    return flow_word(source, source_port, destination, destination_port, protocol) >> 32


def flow_word(source: bytes, source_port: int, destination: bytes, destination_port: int, protocol: int) -> int:
    """The 64 bits of which the hash of a 5-tuple is the upper half."""
    ports = source_port * 2**32 | destination_port * 2**16 | protocol
    words = (
        address_word(source, PI_WORDS[0], PI_WORDS[1]),
        address_word(destination, PI_WORDS[2], PI_WORDS[3]),
        ((ports ^ SEED) * PI_WORDS[4]) & MASK64,
    )
    return murmur_finaliser(SEED ^ words[0] ^ words[1] ^ words[2])


def source_ports(flow: tuple[bytes, int, bytes, int, int]) -> Iterator[int]:
    """The ports that a flow may get towards its task instead of its own, in order (docs/DATAPATH.md)."""
    for n in range(1, 9):
        yield 1024 + slot_for(further_hash(flow_word(*flow) & MASK32, n), 31744)


def client_hash(source: bytes) -> int:
    """32-bit hash of a client's address."""
    return murmur_finaliser(SEED ^ address_word(source, PI_WORDS[0], PI_WORDS[1])) >> 32


def further_hash(first: int, n: int) -> int:
    """Hash of the n-th further choice, n from 1."""
    return murmur_finaliser((n * 2**32 + first) ^ SEED) >> 32


def slot_for(value: int, size: int) -> int:
    """The slot whose share of the hash space holds `value`."""
    return int(Fraction(value, 2**32) * size)


def seed_of(identity: str) -> bytes:
    """Seed of a backend's permutation."""
    return hashlib.blake2b(identity.encode("utf-8"), digest_size=16, person=b"mesh-maglev").digest()


def preferences(seed: bytes, size: int) -> Iterator[int]:
    """A backend's preferred slots, best first: all of them, each once (size is prime)."""
    offset = int.from_bytes(seed[:8], "big") % size
    skip = int.from_bytes(seed[8:], "big") % (size - 1) + 1
    return ((offset + j * skip) % size for j in range(size))


def maglev(size: int, backends: Iterable[Backend]) -> list[int]:
    """Owner of each slot. A backend takes one whenever round * weight / heaviest has reached its next whole turn."""
    active = sorted(entry for entry in backends if entry[2] > 0)
    if not active:
        return [NONE] * size
    heaviest = max(weight for _, _, weight in active)
    wishes = {owner: preferences(seed, size) for seed, owner, _ in active}
    taken = dict.fromkeys(wishes, 0)
    table: dict[int, int] = {}
    for turn in count(1):
        for _, owner, weight in active:
            if Fraction(turn * weight, heaviest) < taken[owner] + 1:
                continue
            taken[owner] += 1
            table[next(slot for slot in wishes[owner] if slot not in table)] = owner
            if len(table) == size:
                return [table[slot] for slot in range(size)]
    raise AssertionError


@dataclass(frozen=True)
class Slot:
    """One slot: whose new flows are, whose un-noted old ones are, and whose noted ones may be besides."""

    current: int
    previous: int
    others: frozenset[int] = frozenset()
    forgotten: bool = False  # there were more others than a slot remembers, or it was read back from a kernel

    @property
    def tracked(self) -> bool:
        return self.previous != self.current or self.forgotten or bool(self.others - {self.current})

    def changed(self, to: int, gone: frozenset[int]) -> Slot:
        """This slot after the table changed so that it is now `to`'s."""
        others = self.others
        if self.current not in (to, self.previous, NONE):
            others |= {self.current}
        others -= gone
        stays = self.previous != NONE and self.previous not in gone
        after = Slot(to, self.previous if stays else to, others, self.forgotten or len(others) > REMEMBERED)
        return after if after.tracked else Slot(to, to)


def fresh(owners: Iterable[int]) -> list[Slot]:
    """A table without a past."""
    return [Slot(owner, owner) for owner in owners]


def transition(old: Sequence[Slot], new: Sequence[int], gone: Iterable[int] = ()) -> list[Slot]:
    """The table that leads from `old` to the owners in `new`, of the same or of another size."""
    dead, size = frozenset(gone), len(new)
    middle = [int(Fraction(2 * i + 1, 2 * size) * len(old)) for i in range(size)]
    return [old[middle[i]].changed(new[i], dead) for i in range(size)]


def settled(table: Sequence[Slot], keep: Iterable[int] = ()) -> list[Slot]:
    """Every slot out of its transition, but for those in `keep`."""
    kept = frozenset(keep)
    return [slot if i in kept else Slot(slot.current, slot.current) for i, slot in enumerate(table)]


def choices(owners: Sequence[int], first: int, limit: int = 4) -> list[int]:
    """Distinct owners that a flow would be given in turn: 8 x limit hashes are looked at, then all owners in turn."""
    hashes = [first, *(further_hash(first, n) for n in range(1, 8 * limit))]
    drawn = [owners[slot_for(h, len(owners))] for h in hashes]
    there = [owner for owner in dict.fromkeys(owners) if owner != NONE]
    turn = slot_for(first, len(there))
    return list(dict.fromkeys([*drawn, *there[turn:], *there[:turn]]))[:limit]


def digest(owners: Sequence[int], names: Mapping[int, str]) -> str:
    """64 bits over the identities of the owners, as hexadecimal digits."""
    keys = [seed_of(names[owner])[:8] if owner in names else owner.to_bytes(8, "big") for owner in owners]
    return hashlib.blake2b(b"".join(keys), digest_size=8, person=b"mesh-digest").hexdigest()


@dataclass
class Forwarder:
    """What an engine does with a packet: a table, a flow cache, and the rule that joins them."""

    table: list[Slot]
    cache: dict[int, int] = field(default_factory=dict)  # owner by flow hash

    def packet(self, flow: int, *, start: bool) -> int:
        slot = self.table[slot_for(flow, len(self.table))]
        if not slot.tracked:
            return slot.current
        if start and slot.current == NONE:  # a refused flow is not noted; an older one under its name has ended
            self.cache.pop(flow, None)
            return NONE
        if start:
            self.cache[flow] = slot.current
        return self.cache.setdefault(flow, slot.previous)

    def change(self, owners: Sequence[int], gone: Iterable[int] = ()) -> None:
        dead = frozenset(gone)
        self.cache = {flow: owner for flow, owner in self.cache.items() if owner not in dead}
        self.table = transition(self.table, owners, dead)


GOLDEN_FLOWS = (
    ("192.0.2.1", 40000, "198.51.100.7", 80, 6),
    ("192.0.2.1", 40001, "198.51.100.7", 80, 6),
    ("192.0.2.2", 40000, "198.51.100.7", 80, 6),
    ("192.0.2.1", 40000, "198.51.100.7", 80, 17),
    ("192.0.2.1", 40000, "198.51.100.8", 53, 17),
    ("2001:db8::1", 65535, "2001:db8:ffff::2", 443, 6),
    ("2001:db8:0:1::1", 1, "2001:db8:ffff::2", 65535, 17),
    ("0.0.0.0", 0, "0.0.0.0", 0, 0),
    ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535, "::", 0, 255),
    ("127.0.0.1", 32768, "127.0.0.1", 8080, 6),
)
GOLDEN_TABLES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1021, (1, 1, 1)),
    (1021, (1, 2, 5, 0)),
    (4093, (1,) * 16),
    (16381, (1,) * 100),
    (65537, (3, 1, 7, 1, 65535)),
)


def golden() -> dict[str, Any]:
    """The vectors in tests/unit/golden_hash.json: nodes of any two versions must agree on them."""
    flows = []
    for source, sport, destination, dport, protocol in GOLDEN_FLOWS:
        first = flow_hash(address(source), sport, address(destination), dport, protocol)
        flows.append(
            {
                "flow": [source, sport, destination, dport, protocol],
                "hash": first,
                "client": client_hash(address(source)),
                "again": [further_hash(first, n) for n in (1, 2, 3)],
                "slots": {str(size): slot_for(first, size) for size in (1021, 4093, 16381, 65537, 655373)},
            }
        )
    tables = []
    for size, weights in GOLDEN_TABLES:
        names = {FIRST + i: f"backend-{i}" for i in range(len(weights))}
        owners = maglev(size, [(seed_of(names[FIRST + i]), FIRST + i, w) for i, w in enumerate(weights)])
        tables.append(
            {
                "size": size,
                "weights": list(weights),
                "head": owners[:32],
                "digest": digest(owners, names),
                "choices": [choices(owners, f["hash"]) for f in flows],  # type: ignore[arg-type]
            }
        )
    seeds = {name: seed_of(name).hex() for name in ("backend-0", "", "tâche")}
    return {"flows": flows, "seeds": seeds, "tables": tables}


if __name__ == "__main__":
    json.dump(golden(), sys.stdout, indent=1, ensure_ascii=False)
