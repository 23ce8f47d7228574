# SPDX-License-Identifier: Apache-2.0
"""A QEMU guest with Debian's stock kernel over this machine's own file system, for one command.

The guest sees the root file system read-only (9p) under an overlay in memory: the same Python, the same build, nothing
to install and nothing left behind. It has no network but what the command makes itself. Software emulation (TCG): slow,
deterministic, needs no /dev/kvm.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.guest.kernels import Kernel, copy_module, module_files

ROOT = Path(__file__).parents[2]
PYTEST = f"{sys.executable} -m pytest -q --color=no -p no:cacheprovider"
"""As it is started in the guest."""

MODULES = [
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "veth",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_redir",
    "nft_chain_nat",
    "nft_fib_inet",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "udp_diag",
    "ip_vs",
    "ip_vs_rr",
    "xt_ipvs",
    "iptable_nat",
    "ip_tables",
    "vxlan",
    "dummy",
    "wireguard",
    "8021q",
    "act_vlan",
    "cls_matchall",
    "virtio_net",
    "e1000",
]

ENGINES = [
    "br_netfilter",
    "nft_compat",
    "nft_meta_bridge",
    "nft_reject_bridge",
    "nft_masq",
    "nft_limit",
    "nft_log",
    "nft_reject_inet",
    "xt_MASQUERADE",
    "xt_REDIRECT",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_limit",
    "xt_mark",
    "xt_multiport",
    "xt_nat",
    "xt_tcpudp",
    "ipt_REJECT",
    "iptable_filter",
    "iptable_mangle",
    "ip6table_filter",
    "ip6table_nat",
    "nf_conntrack_netlink",
    "xfrm_user",
]
"""What Docker's own mesh takes besides: IPVS is in MODULES."""

CARDS = ("virtio-net-pci", "virtio-net-pci", "e1000")  # on one wire, which leads nowhere else

INIT = """#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
for module in $($bb cat /modules); do $bb insmod "/lib/modules/$module" 2>/dev/null; done
$bb mkdir -p /lower /mem /root
$bb mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /lower || $bb poweroff -f
$bb mount -t tmpfs mem /mem
$bb mkdir /mem/upper /mem/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/mem/upper,workdir=/mem/work overlay /root || $bb poweroff -f
for fs in proc sysfs:sys devtmpfs:dev; do $bb mount -t "${fs%:*}" none "/root/${fs#*:}"; done
$bb mount -t tmpfs none /root/run
$bb mount -t bpf none /root/sys/fs/bpf
$bb mount -t cgroup2 none /root/sys/fs/cgroup
$bb mount -t debugfs none /root/sys/kernel/debug
$bb mount -t tracefs none /root/sys/kernel/tracing
$bb cp /command /last /root/run/
$bb ip link set lo up
exec $bb switch_root /root /bin/bash /run/last
"""

LAST = """/bin/bash /run/command </dev/null
echo "guest exit status: $?"
/bin/busybox poweroff -f
"""


class GuestError(RuntimeError):
    """The guest did not boot, or did not come to an end in time; the message has the end of its console."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the command in the guest left: its exit status and all that it (and the kernel) printed."""

    status: int
    output: str


def _initramfs(kernel: Kernel, command: str, directory: Path, modules: Sequence[str]) -> Path:
    tree = directory / "initramfs"
    shutil.rmtree(tree, ignore_errors=True)
    for sub in ("bin", "proc", "sys", "dev", "lib/modules"):
        (tree / sub).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    names = [copy_module(file, tree / "lib/modules") for file in module_files(kernel, modules)]
    (tree / "modules").write_text("\n".join(names))
    (tree / "command").write_text(command)
    (tree / "last").write_text(LAST)
    init = tree / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    archive = directory / "initramfs.cpio"
    inside = subprocess.run(["find", "."], cwd=tree, check=True, capture_output=True).stdout
    with archive.open("wb") as out:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=inside, stdout=out, check=True)
    return archive


def run_in_guest(
    kernel: Kernel,
    command: str,
    directory: Path,
    *,
    cwd: Path,
    timeout: float,
    memory: int = 1536,
    modules: Sequence[str] = MODULES,
    own_time: bool = False,
) -> Result:
    """Boot, run `command` with bash in `cwd`, power off.

    Args:
        directory: scratch space for the initial file system, and for `console`, what was printed so far.
        timeout: seconds until the guest is ended.
        memory: MiB.
        own_time: time goes by with what its one processor does, however slow this machine is: so do its time-outs.

    Raises:
        GuestError: no boot, or no end in time.
    """
    script = f"cd {shlex.quote(str(cwd))}\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp\n{command}\n"
    archive = _initramfs(kernel, script, directory, modules)
    processors = ["tcg,thread=multi", "-smp", "2"]
    if own_time:
        processors = ["tcg,thread=single", "-smp", "1", "-icount", "shift=1"]
    argv = [
        *("nice", "-n", "10"),  # what runs beside it has deadlines of its own
        *("qemu-system-x86_64", "-cpu", "Nehalem", "-m", str(memory), "-accel", *processors),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(archive)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
    ]
    for number, card in enumerate(CARDS):
        argv += ["-netdev", f"hubport,id=port{number},hubid=0"]
        argv += ["-device", f"{card},netdev=port{number},mac=52:54:00:00:00:{number:02x},romfile="]
    printed = directory / "console"
    with printed.open("wb") as console:
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.PIPE, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            said = printed.read_text(errors="replace")[-4000:]
            raise GuestError(f"the guest did not end within {timeout:.0f} s; its console ends:\n{said}") from error
    output = printed.read_text(errors="replace")
    for line in output.splitlines():
        if line.startswith("guest exit status: "):
            return Result(int(line.split()[-1]), output)
    said = done.stderr.decode(errors="replace")[-1000:]
    raise GuestError(f"the guest did not run the command:\n{output[-4000:]}{said}")
