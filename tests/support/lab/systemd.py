# SPDX-License-Identifier: Apache-2.0
"""A real systemd as process 1 of a minimal Debian: this host's /usr, read-only, in namespaces of its own.

It has its own processes, mounts, cgroups and bpf file system, and the network of one of the lab's hosts. So a unit runs
in the very sandbox that it asks for, in a second and without an image.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

from tests.support.lab.netns import Lab, Namespace, run
from tests.support.polling import PATIENCE, wait_for

ROOT = Path(__file__).parents[3]
UNITS = (
    "basic", "sysinit", "shutdown", "umount", "local-fs", "local-fs-pre", "network", "network-online", "paths",
    "slices", "sockets", "timers", "final", "exit", "poweroff", "reboot", "halt",
)  # fmt: skip
"""Targets that units refer to; nothing else of the distribution is started."""

BOOT = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p usr etc/systemd/system proc sys dev run tmp var/tmp var/log var/lib root home old units none lab
mkdir -p opt/mesh/bin opt/python opt/site opt/src
for name in bin sbin lib lib64; do test ! -L /$name || ln -s usr/$name $name; done
read_only() { mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }
read_only /usr usr
read_only "$prefix" opt/python
read_only "$site" opt/site
read_only "$source" opt/src
mount --bind "$lab" lab
for unit in $units; do cp /usr/lib/systemd/system/$unit.target units/; done
mount --bind units usr/lib/systemd/system
mount --bind none usr/lib/systemd/system-generators
cp -a "$files/." .
cp -a /etc/ld.so.cache etc/
mount -t proc proc proc
read_only proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf -o mode=700 bpf sys/fs/bpf
mount -t tmpfs -o mode=755 dev dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
touch dev/console
mount --bind "$console" dev/console
pivot_root . old
exec chroot . /bin/sh -c 'umount -l /old && exec env -i container=mesh PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --log-target=console --show-status=no --unit=default.target'
"""

PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
GROUP = "root:x:0:\nnogroup:x:65534:\n"


def program(module: str) -> str:
    """A shell script that runs a Python module of this build in there."""
    return (
        "#!/bin/sh\nexport LD_LIBRARY_PATH=/opt/python/lib\n"
        "export PYTHONPATH=/opt/src:/opt/site PYTHONDONTWRITEBYTECODE=1\n"
        f'exec /opt/python/bin/python{sysconfig.get_python_version()} -m {module} "$@"\n'
    )


class Systemd:
    """A booted systemd with one unit; `files` are written below its root, by path.

    In it, /opt/mesh/bin/mesh is this build and /lab the lab's directory.
    """

    def __init__(self, lab: Lab, namespace: Namespace, unit: Path, files: dict[str, str]) -> None:
        self.unit = unit.name
        self.log = lab.directory / "systemd.log"
        hierarchy = lab.directory / "cgroup2"  # of its own: where the host has it mounted, if at all, differs
        hierarchy.mkdir()
        run("mount", "-t", "cgroup2", "cgroup2", str(hierarchy))
        lab.on_close(lambda: run("umount", str(hierarchy)))
        self._cgroup = hierarchy / f"{lab.prefix}-systemd"
        draft, root = lab.directory / "systemd-files", lab.directory / "systemd-root"
        root.mkdir()
        machine_id = f"{time.time_ns():032x}"
        for path, text in {
            "etc/passwd": PASSWD,
            "etc/group": GROUP,
            "etc/machine-id": f"{machine_id}\n",
            "etc/hostname": f"{namespace.short}\n",
            "etc/systemd/system/default.target": f"[Unit]\nWants={unit.name}\nAfter={unit.name}\n",
            f"etc/systemd/system/{unit.name}": unit.read_text(),
            "opt/mesh/bin/mesh": program("mesh"),
            **files,
        }.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_text(text)
        for script in (draft / "opt/mesh/bin").iterdir():
            script.chmod(0o755)
        variables = {
            "root": root,
            "prefix": sys.base_prefix,
            "site": sysconfig.get_path("purelib"),
            "source": ROOT,
            "lab": lab.directory,
            "console": self._console(),
            "files": draft,
            "units": " ".join(UNITS),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        self._cgroup.mkdir()
        lab.on_close(self._remove_cgroup)
        enter = f'echo 0 > {self._cgroup}/cgroup.procs && exec unshare -m -p -u -i -C -f --kill-child sh -c "$boot"'
        with self.log.open("ab") as log:
            self._outer = namespace.popen(
                "sh",
                "-c",
                enter,
                stdout=log,
                stderr=log,
                env={k: str(v) for k, v in variables.items()} | {"boot": BOOT},
            )
        lab.on_close(self.close)
        self.pid = wait_for(self._child, "process 1")

    def _console(self) -> str:
        """A terminal, which systemd wants for its words; they come to the log."""
        master, slave = os.openpty()

        def copy() -> None:
            with self.log.open("ab", buffering=0) as log, contextlib.suppress(OSError):
                while data := os.read(master, 65536):
                    log.write(data)
            os.close(master)

        self._slave = slave  # until the end: without any user of it, reading ends
        threading.Thread(target=copy, daemon=True).start()
        return os.ttyname(slave)

    def _child(self) -> int | None:
        """systemd's process id, seen from here."""
        if self._outer.poll() is not None:
            raise RuntimeError(f"systemd has ended:\n{self.tail()}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return child
        return None

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-6000:]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as systemd's child would, outside of any unit's sandbox."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "--", *command]
        # Into its cgroups too: a process of this host is in none of them.
        place = f'echo $$ > {self._cgroup}/init.scope/cgroup.procs && exec "$@"'
        return subprocess.run(
            ["sh", "-c", place, "sh", *enter], capture_output=True, text=True, check=False, timeout=PATIENCE
        )

    def show(self, *properties: str) -> dict[str, str]:
        """Properties of the unit."""
        done = self.run("systemctl", "show", self.unit, *(f"--property={each}" for each in properties))
        return dict(line.partition("=")[::2] for line in done.stdout.splitlines())

    def close(self) -> None:
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1
        self._outer.kill()
        self._outer.wait()

    def _remove_cgroup(self) -> None:
        def gone() -> bool:
            for path in sorted(self._cgroup.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            return not self._cgroup.exists()

        wait_for(gone, f"end of {self._cgroup}")


def missing() -> str:
    """What this machine lacks for it; empty: nothing."""
    if shutil.which("systemd-analyze") is None or not Path("/lib/systemd/systemd").exists():
        return "no systemd"
    return "" if "\tcgroup2\n" in Path("/proc/filesystems").read_text() else "no cgroup2"
