# SPDX-License-Identifier: Apache-2.0
"""mesh._bpf against the running kernel, with a small object of its own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh import _bpf
from mesh.errors import BpfError
from tests.bpf.wires import inside

pytestmark = [pytest.mark.root, pytest.mark.bpf]

TCX_INGRESS = 46
CGROUP_INET_INGRESS = 0
SOURCE = r"""
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} numbers SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64[2]);
} counts SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");
const volatile __u32 knob = 3;
SEC("tc") int count(struct __sk_buff *skb)
{
	__u32 key = 5;
	__u64 *v = bpf_map_lookup_elem(&counts, &key);

	if (v) {
		v[0] += 1;
		v[1] += skb->len;
	}
	return knob;
}
SEC("cgroup_skb/ingress") int all(struct __sk_buff *skb)
{
	return 1;
}
char _license[] SEC("license") = "GPL";
"""
BROKEN = r"""
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("tc") int broken(struct __sk_buff *skb)
{
	return *(__u32 *)(long)skb->data; /* no bounds check */
}
char _license[] SEC("license") = "GPL";
"""


def compile_bpf(directory: Path, source: str) -> str:
    text, out = directory / "t.bpf.c", directory / "t.bpf.o"
    text.write_text(source)
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    clang = os.environ.get("CLANG") or shutil.which("clang-16") or "clang"  # as setup.py
    subprocess.run([clang, "-O2", "-g", "-target", "bpf", include, "-c", str(text), "-o", str(out)], check=True)
    return str(out)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_bpf(tmp_path_factory.mktemp("bpf"), SOURCE)


@pytest.fixture
def loaded(path: str) -> _bpf.Object:
    loaded = _bpf.Object(path)
    loaded.load()
    return loaded


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"mesh{os.getpid()}-bind"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def u32(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


def test_knobs_are_set_before_load_and_seen_by_the_program(path: str) -> None:
    loaded = _bpf.Object(path)
    assert loaded.get("knob") == u32(3)
    loaded.set("knob", 2)
    loaded.load()
    assert loaded.program("count").test_run(bytes(64)).retval == 2
    with pytest.raises(ValueError, match="before the load"):
        loaded.set("knob", 1)
    with pytest.raises(BpfError, match="no_such"):
        _bpf.Object(path).set("no_such", 1)


def test_maps_and_programs_are_listed_and_resized(path: str) -> None:
    loaded = _bpf.Object(path)
    assert {"numbers", "counts", "table"} <= set(loaded.maps())
    assert loaded.programs() == {"count": "tc", "all": "cgroup_skb/ingress"}
    loaded.resize("numbers", 99)
    loaded.skip("all")
    loaded.load()
    assert loaded.map("numbers").max_entries == 99


def test_entries_are_stored_found_and_deleted(loaded: _bpf.Object) -> None:
    numbers = loaded.map("numbers")
    assert numbers.lookup(u32(7)) is None
    numbers.update(u32(7), u64(49))
    assert numbers.lookup(u32(7)) == u64(49)
    with pytest.raises(BpfError, match="numbers: EEXIST"):
        numbers.update(u32(7), u64(50), _bpf.NOEXIST)
    assert numbers.delete(u32(7))
    assert not numbers.delete(u32(7))
    with pytest.raises(ValueError, match="a key is 4 bytes"):
        numbers.lookup(b"abc")


@pytest.mark.parametrize("count", [0, 1, 257, 4096])
def test_batches_carry_everything(loaded: _bpf.Object, count: int) -> None:
    numbers = loaded.map("numbers")
    numbers.update_batch(u32(*range(count)), u64(*(n * n for n in range(count))))
    keys, values = numbers.dump()
    pairs = dict(zip(struct.unpack(f"={count}I", keys), struct.unpack(f"={count}Q", values), strict=True))
    assert pairs == {n: n * n for n in range(count)}
    some = u32(*range(0, 5000, 2))  # those that are not there are passed over
    assert numbers.delete_batch(some) == (count + 1) // 2
    assert len(numbers.dump()[0]) == 4 * (count // 2)


def test_per_cpu_counters_are_summed(loaded: _bpf.Object) -> None:
    program, counts = loaded.program("count"), loaded.map("counts")
    threads = [threading.Thread(target=program.test_run, args=(bytes(100),), kwargs={"repeat": 50}) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    keys, sums = counts.sums()
    assert len(keys) == 16 * 4
    assert sums[5 * 16 : 6 * 16] == u64(200, 200 * 100)
    assert len(counts.sums(6)[0]) == 6 * 4
    assert counts.stride == 16 * _bpf.possible_cpus()


def test_mapping_is_the_map(loaded: _bpf.Object) -> None:
    table = loaded.map("table")
    view = _bpf.Mapping(table)
    assert (view.size, view.step) == (8192, 8)
    view.store64(8, 11)
    assert table.lookup(u32(1)) == u64(11)
    view.write(16, u64(12, 13))
    view.store32(20, 1)
    assert table.lookup(u32(2)) == u64(1 << 32 | 12)
    assert view.read(8, 8) == u64(11)
    assert (view.load64(8), view.load32(20)) == (11, 1)
    for offset in (8192, 4, -8):
        with pytest.raises((IndexError, OverflowError)):
            view.store64(offset, 0)
    with pytest.raises(BpfError, match="counts"):
        _bpf.Mapping(loaded.map("counts"))


def test_map_of_maps_takes_tables_of_several_sizes_by_one_call() -> None:
    flags = _bpf.INNER_MAP
    tables = [_bpf.Map.create(_bpf.ARRAY, f"t{n}", 4, 8, n, flags) for n in (1021, 4093, 16381)]
    outer = _bpf.Map.create(_bpf.ARRAY_OF_MAPS, "outer", 4, 4, 64, inner=tables[0])
    outer.update_batch(u32(3, 4, 5), u32(*(t.fileno() for t in tables)))
    found = outer.lookup(u32(4))
    assert found == u32(tables[1].id)
    assert _bpf.Map.by_id(tables[1].id).max_entries == 4093


def test_frozen_map_refuses_changes(loaded: _bpf.Object) -> None:
    frozen = loaded.map("numbers")
    frozen.freeze()
    with pytest.raises(BpfError, match="EPERM"):
        frozen.update(u32(1), u64(1))


def test_pins_are_opened_and_reused_by_the_next_object(path: str, bpffs: Path, loaded: _bpf.Object) -> None:
    loaded.map("numbers").update(u32(1), u64(10))
    loaded.map("numbers").pin(str(bpffs / "numbers"))
    loaded.program("count").pin(str(bpffs / "count"))
    tag = loaded.program("count").tag
    del loaded
    again = _bpf.Object(path)
    again.reuse("numbers", _bpf.Map.open(str(bpffs / "numbers")))
    again.load()
    assert again.map("numbers").lookup(u32(1)) == u64(10)
    assert _bpf.Program.open(str(bpffs / "count")).tag == tag
    with pytest.raises(BpfError, match="ENOENT"):
        _bpf.Map.open(str(bpffs / "absent"))


def test_cgroup_link_is_pinned_updated_and_detached(path: str, bpffs: Path, loaded: _bpf.Object) -> None:
    mounts = Path("/proc/mounts").read_text()
    found = re.search(r"^\S+ (\S+) cgroup2 ", mounts, re.MULTILINE)
    assert found, "no cgroup2 is mounted"
    group = Path(found[1]) / f"mesh{os.getpid()}-bind"
    group.mkdir()
    try:
        directory = os.open(group, os.O_RDONLY)
        first = loaded.program("all")
        link = _bpf.Link.create(first, directory, CGROUP_INET_INGRESS)
        os.close(directory)
        link.pin(str(bpffs / "link"))
        link.close()
        second = _bpf.Object(path)
        second.load()
        adopted = _bpf.Link.open(str(bpffs / "link"))
        assert adopted.info()[0] == first.id
        adopted.update(second.program("all"))
        assert adopted.info()[0] == second.program("all").id
        adopted.detach()
        assert adopted.info()[0] == second.program("all").id  # the link is there, attached to nothing
    finally:
        group.rmdir()


def test_clsact_filter_is_replaced_in_place(path: str, namespace: str, loaded: _bpf.Object) -> None:
    with inside(namespace):
        second = _bpf.Object(path)
        second.load()
        assert _bpf.tc_program(1, True, 1, 7) == 0
        assert _bpf.tc_attach(loaded.program("count"), 1, True, 1, 7)
        assert not _bpf.tc_attach(second.program("count"), 1, True, 1, 7)
        assert _bpf.tc_program(1, True, 1, 7) == second.program("count").id
        assert _bpf.tc_detach(1, True, 1, 7)
        assert not _bpf.tc_detach(1, True, 1, 7)
        with pytest.raises(BpfError, match="interface 4711: E"):
            _bpf.tc_attach(loaded.program("count"), 4711, True, 1, 7)


def test_tcx_link_is_updated_and_outlives_its_interface(path: str, namespace: str, loaded: _bpf.Object) -> None:
    release = tuple(int(x) for x in re.findall(r"\d+", os.uname().release)[:2])
    if release < (6, 6):
        pytest.skip("tcx is there from kernel 6.6 on")
    with inside(namespace):
        subprocess.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=True)
        index = socket.if_nametoindex("v0")
        link = _bpf.Link.create(loaded.program("count"), index, TCX_INGRESS)
        second = _bpf.Object(path)
        second.load()
        link.update(second.program("count"))
        assert link.info() == (second.program("count").id, index)
        subprocess.run(["ip", "link", "del", "v0"], check=True)
        assert link.info()[1] == 0


def test_refused_program_tells_the_end_of_the_verifiers_log(tmp_path: Path) -> None:
    broken = _bpf.Object(compile_bpf(tmp_path, BROKEN))
    with pytest.raises(BpfError, match="invalid access to packet") as caught:
        broken.load()
    assert caught.value.errno != 0
    with pytest.raises(BpfError, match="ENOENT"):
        _bpf.Object(str(tmp_path / "absent.o"))


def test_statistics_count_runs(loaded: _bpf.Object) -> None:
    program = loaded.program("count")
    before = program.statistics()[1]
    statistics = _bpf.Statistics()
    program.test_run(bytes(64), repeat=10)
    statistics.close()
    assert program.statistics()[1] == before + 10
    program.test_run(bytes(64), repeat=10)
    assert program.statistics()[1] == before + 10  # nobody counts any more
