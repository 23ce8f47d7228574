# SPDX-License-Identifier: Apache-2.0
"""`mesh stop`: stop the daemon, and hand the ports back if asked to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mesh.agent.lock import Lock
from mesh.cli.client import call, daemon_options
from mesh.cli.exit import DaemonUnreachableError, Exit
from mesh.cli.output import echo_json
from mesh.config.load import load


@click.command(short_help="Stop the daemon, optionally hand the ports back.")
@click.option("--release", is_flag=True, help="Also hand the ports back to Docker's own mesh.")
@click.option("--now", is_flag=True, help="With --release, where no daemon runs: do not wait for connections.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the daemon is gone.")
@click.option("--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Longest wait, seconds.")
@daemon_options
def stop(release: bool, now: bool, wait: bool, timeout: float, state_dir: Path, as_json: bool) -> None:
    """Stop the daemon as SIGTERM does: accept nothing new, let connections end (at most drain_timeout), leave.

    What the kernel engine has in the kernel forwards on without a daemon, by the tables of that moment. --release takes
    it off, also where no daemon runs any more: flows that start are left to whoever serves the ports besides at once,
    those under way are waited for, unless it is to be --now. (Where they are pinned, bpf_fs, is as configured for
    `mesh run` by the default file or MESH_BPF_FS.)

    \b
    Exit code: 0 it is gone (or going, with --no-wait); 1 still there after --timeout.
    Example:   mesh stop --release
    """
    try:
        answer = call(state_dir, "/stop", body={"release": release})
    except DaemonUnreachableError as error:
        if not release:
            raise
        _clear(state_dir, timeout if wait and not now else 0.0, now, as_json, error)
        return
    gone = not wait or _wait_gone(state_dir, timeout)
    if as_json:
        echo_json({**answer, "gone": gone if wait else None})
    elif wait:
        pid = answer["pid"]
        click.echo(f"daemon {pid} stopped" if gone else f"daemon {pid} is still draining after {timeout:g} s")
    else:
        click.echo(f"daemon {answer['pid']} is stopping")
    if not gone:
        sys.exit(Exit.NOT_READY)


def _clear(state_dir: Path, seconds: float, now: bool, as_json: bool, unreachable: DaemonUnreachableError) -> None:
    """Take off what a kernel engine has left whose daemon is gone."""
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf
    except ImportError:
        raise unreachable from None
    remains = cleanup.find(load({"state_dir": str(state_dir)}))
    if not state_dir.is_dir() or remains is None or not (remains.programs or remains.table.exists()):
        raise unreachable
    lock = Lock.acquire(state_dir)
    try:
        if remains.table.exists():
            remains.table.delete()
        remains.hand_back()
        flows = 0 if now else remains.wait(seconds)
        if remains.programs and not flows:
            remains.take_off()
    finally:
        remains.close()
        lock.close()
    if as_json:
        echo_json({"pid": None, "flows": flows, "gone": not flows})
    elif flows:
        click.echo(
            f"no daemon ran; the ports are handed back; {flows} flows still go through the programs (--now cuts them)"
        )
    else:
        click.echo("no daemon ran; what it had left in the kernel is taken off")
    if flows:
        sys.exit(Exit.NOT_READY)


def _wait_gone(state_dir: Path, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            call(state_dir, "/readyz", accept=(503,))
        except DaemonUnreachableError:
            return True
        time.sleep(0.1)
    return False
