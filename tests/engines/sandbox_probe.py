# SPDX-License-Identifier: Apache-2.0
"""What the daemon does and a sandbox can forbid, and what the unit's sandbox has to forbid; run as the unit's program.

It tries each by itself, with the daemon's own code where it has some, and writes what went wrong to REPORT, as JSON: an
object of name and reason.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

from mesh.datapath.conntrack import Conntrack
from mesh.datapath.kernel.namespaces import _cookie_in, _mounted
from mesh.datapath.kernel.stale_sockets import StaleSockets
from mesh.datapath.netlink import Monitor
from mesh.datapath.paths import tunnel_probe
from mesh.datapath.proxy import nft
from mesh.model import ANY_ADDRESS, Frontend, Protocol

REPORT = Path("/run/mesh/sandbox.json")
ENGINE, OTHER = Path("/lab/docker.sock"), Path("/lab/other/key")
"""A socket with the Engine's mode, and a file that another user keeps in a directory of their own."""

PIPE, PIPES = 1 << 20, 80  # more than a user without rights may have


def engine_socket() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(ENGINE))


def files_of_other_users() -> None:
    OTHER.read_bytes()


def state() -> None:
    for directory in (REPORT.parent, Path("/var/lib/mesh")):
        new = directory / "new"
        new.write_text("")
        new.chmod(0o600)
        new.replace(directory / "old")
        (directory / "old").unlink()


def notifications() -> None:
    for monitor in (Monitor(), nft.monitor()):
        monitor.close()


def ends_of_sockets() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
        stale = StaleSockets(Mock(), {})
        port = sock.getsockname()[1]
        found = [each for each in stale._connected(socket.AF_INET) if each.id.idiag_sport == port]
        assert [stale._destroy(each) for each in found] == [True]
        stale.close()


def connection_tracking() -> None:
    Conntrack().of(Frontend(ANY_ADDRESS, 53, Protocol.UDP))


def nftables() -> None:
    table = nft.NftTable("mesh_probe")
    table.load("  chain prerouting {\n    type nat hook prerouting priority -110; policy accept;\n  }\n")
    assert table.exists()
    table.delete()


def packet_sockets() -> None:
    tunnel_probe.listen(4, 6084, 1234).close()


def namespaces_of_other_processes() -> None:
    assert _cookie_in("/proc/1/ns/net")
    list(_mounted("1"))
    assert Path("/proc/1/root/etc/passwd").exists()


def socket_options() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
        sock.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        sock.bind(("", 81))


def memory_files() -> None:
    descriptor = os.memfd_create("probe", os.MFD_CLOEXEC)
    os.write(descriptor, b"x")
    assert Path(f"/proc/self/fd/{descriptor}").read_bytes() == b"x"


def pipes() -> None:
    ends = [os.pipe() for _ in range(PIPES)]
    sizes = {fcntl.fcntl(end[0], fcntl.F_SETPIPE_SZ, PIPE) for end in ends}
    assert sizes == {PIPE}


def nothing_else_is_written() -> None:
    for path in ("/etc/x", "/usr/x", "/opt/x", "/lab/x", "/sys/fs/cgroup/x/y", "/boot/x", "/root/x"):
        try:
            Path(path).write_text("")
        except OSError:
            continue
        raise AssertionError(path)


def calls_are_refused() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ptrace_seize, clone_newuser = 0x4206, 0x10000000
    refused: dict[str, Callable[[], int]] = {
        "mount": lambda: libc.mount(b"bpf", b"/run/mesh", b"bpf", 0, None),
        "ptrace": lambda: libc.ptrace(ptrace_seize, 1, None, None),
        "unshare": lambda: libc.unshare(clone_newuser),
        "process_vm_readv": lambda: libc.process_vm_readv(1, None, 0, None, 0, 0),
    }
    for name, call in refused.items():
        assert call() == -1, name
        assert ctypes.get_errno() == errno.EPERM, f"{name}: {errno.errorcode[ctypes.get_errno()]}"


PROBES = (
    engine_socket,
    files_of_other_users,
    state,
    notifications,
    ends_of_sockets,
    connection_tracking,
    nftables,
    packet_sockets,
    namespaces_of_other_processes,
    socket_options,
    memory_files,
    pipes,
    nothing_else_is_written,
    calls_are_refused,
)


def main() -> None:
    """Try all; the report says which failed, and why."""
    failed = {}
    for probe in PROBES:
        try:
            probe()
        except (OSError, AssertionError, ValueError) as error:
            failed[probe.__name__] = repr(error)
    REPORT.write_text(json.dumps(failed))


if __name__ == "__main__":
    main()
