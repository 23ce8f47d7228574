# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel engine can run here, and if not, why: one sentence, for the log and for `mesh check`; and where
it keeps its pins."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import socket
from pathlib import Path
from typing import Final

from mesh._maglev import ABI_DIGEST, ABI_VERSION
from mesh.config.keys import Config
from mesh.errors import DatapathError

KERNEL: Final = (5, 15)
BPF_FS_MAGIC: Final = 0xCAFE4A11
CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 21, 38, 39
CAPABILITIES: Final = {CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_BPF: "CAP_BPF", CAP_PERFMON: "CAP_PERFMON"}
SO_NETNS_COOKIE: Final = 71
CONTRACT: Final = f"{ABI_VERSION}-{ABI_DIGEST}"  # name of this build's directory below `pin_home`
NAMES, OWNER = "kernel-names.json", "kernel-owner"  # files in the state directory


def netns_cookie() -> int:
    """The kernel's number for this network namespace, never given twice."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def instance(config: Config) -> str:
    """Name of this daemon's pins: one for each state directory in each network namespace."""
    text = f"{Path(config.state_dir).resolve()}\0{netns_cookie()}"
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def pin_home(config: Config) -> Path:
    """Where this daemon's pins are, a directory for each contract."""
    return Path(config.bpf_fs) / "mesh" / instance(config)


def capabilities() -> set[int]:
    """Effective capabilities of this process, by their numbers."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return {bit for bit in range(64) if effective >> bit & 1}


def missing_capabilities() -> list[str]:
    """Names of the capabilities that are needed and that this process does not have."""
    has = capabilities()
    if CAP_SYS_ADMIN in has:
        has |= {CAP_BPF, CAP_PERFMON}
    return [name for bit, name in CAPABILITIES.items() if bit not in has]


def is_bpf_fs(path: Path) -> bool:
    """Whether a bpf file system is mounted at or above `path`."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") == BPF_FS_MAGIC


def ensure_bpf_fs(path: Path) -> None:
    """Mount a bpf file system at `path` unless there is one.

    Raises:
        DatapathError: there is none and it cannot be mounted.
    """
    if is_bpf_fs(path):
        return
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        name = errno.errorcode.get(ctypes.get_errno(), "?")
        raise DatapathError(
            f"no bpf file system is mounted there, and mounting one failed: {name}",
            where=str(path),
            remedy=f"mount -t bpf bpf {path}",
        )


def no_bpf_fs(path: Path) -> str | None:
    """Why there is no bpf file system at `path` to write to and none can be mounted; changes nothing."""
    if is_bpf_fs(path):
        if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            return None
        return f"{path}: the bpf file system there cannot be written to (mount -o remount,rw {path}, or set bpf_fs)"
    if CAP_SYS_ADMIN in capabilities():
        return None
    return f"{path}: no bpf file system is mounted there, and CAP_SYS_ADMIN to mount one is missing"


def preflight(config: Config) -> str | None:
    """Why the kernel engine cannot run here, in one sentence with its remedy; None: it can."""
    try:
        from mesh import _bpf  # noqa: PLC0415 -- absent where it was built without libbpf
        from mesh.datapath import kernel_attach, kernel_maps  # noqa: PLC0415
    except ImportError as error:
        return f"this build has no kernel engine: {error}"
    if config.provider == "demo":
        return "the demo's backends are processes of this node, which the kernel engine does not serve"
    release, missing, reason = kernel_attach.kernel_release(), missing_capabilities(), None
    if release < KERNEL:
        reason = f"kernel {release[0]}.{release[1]} is older than {KERNEL[0]}.{KERNEL[1]}"
    elif missing:
        reason = f"not permitted: {', '.join(missing)} missing (run as root, or grant them)"
    else:
        try:
            reason = no_bpf_fs(Path(config.bpf_fs))
            kernel_maps.probe()
            kernel_attach.probe()
        except _bpf.BpfError as error:
            remedy = " (raise LimitNOFILE= or ulimit -Hn)" if error.errno == errno.EMFILE else ""
            reason = f"the kernel refuses: {str(error).splitlines()[0]}{remedy}"
        except (DatapathError, OSError) as error:
            reason = str(error)
    return reason


def remove_pins(directory: Path) -> None:
    """Remove a pin directory with all that is in it; what nothing else holds is freed."""
    if not directory.is_dir():
        return
    for each in directory.iterdir():
        if each.is_dir():
            remove_pins(each)
        else:
            each.unlink(missing_ok=True)
    directory.rmdir()
