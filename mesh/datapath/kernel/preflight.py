# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel engine can run here; if not, the reason in one sentence, for the log and for `mesh check`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from mesh.config.keys import Config
from mesh.datapath.kernel.pins import is_bpf_fs
from mesh.errors import DatapathError

KERNEL: Final = (6, 1)  # the oldest on which it is tested
CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 19, 21, 38, 39
CAPABILITIES: Final = {CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_BPF: "CAP_BPF", CAP_PERFMON: "CAP_PERFMON"}


def capabilities() -> set[int]:
    """Effective capabilities of this process, by number."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return {bit for bit in range(64) if effective >> bit & 1}


def missing_capabilities() -> list[str]:
    """Names of the required capabilities that this process lacks."""
    has = capabilities()
    if CAP_SYS_ADMIN in has:
        has |= {CAP_BPF, CAP_PERFMON}
    return [name for bit, name in CAPABILITIES.items() if bit not in has]


def no_bpf_fs(path: Path) -> str | None:
    """Why `path` has no writable bpf file system and cannot get one; None: it can be used. Changes nothing."""
    if is_bpf_fs(path):
        if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            return None
        return f"{path}: the bpf file system there cannot be written to (mount -o remount,rw {path}, or set bpf_fs)"
    if CAP_SYS_ADMIN in capabilities():
        return None
    return f"{path}: no bpf file system is mounted there, and CAP_SYS_ADMIN to mount one is missing"


def preflight(config: Config) -> str | None:
    """Why the kernel engine cannot run here, in one sentence with the remedy; None: it can."""
    try:
        from mesh import _bpf  # noqa: PLC0415 -- absent where it was built without libbpf
        from mesh.datapath.kernel import attach, loader  # noqa: PLC0415
    except ImportError as error:
        return f"this build has no kernel engine: {error}"
    if config.provider == "demo":
        return "the demo's backends are processes of this node, which the kernel engine does not serve"
    release, missing, reason = attach.kernel_release(), missing_capabilities(), None
    if release < KERNEL:
        reason = f"kernel {release[0]}.{release[1]} is older than {KERNEL[0]}.{KERNEL[1]}"
    elif missing:
        reason = f"not permitted: {', '.join(missing)} missing (run as root, or grant them)"
    else:
        try:
            reason = no_bpf_fs(Path(config.bpf_fs))
            loader.probe()
            attach.probe()
        except _bpf.BpfError as error:
            remedy = " (raise LimitNOFILE= or ulimit -Hn)" if error.errno == errno.EMFILE else ""
            reason = f"the kernel refuses: {str(error).splitlines()[0]}{remedy}"
        except (DatapathError, OSError) as error:
            reason = str(error)
    return reason
