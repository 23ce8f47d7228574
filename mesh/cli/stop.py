# SPDX-License-Identifier: Apache-2.0
"""`mesh stop`: stop the daemon, and hand the ports back if asked to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from mesh.agent.lock import Lock
from mesh.cli.client import call, daemon_options, holds
from mesh.cli.exit import DaemonUnreachableError, Exit
from mesh.cli.output import echo_json
from mesh.config.load import load


@click.command()
@click.option("--release", is_flag=True, help="Also hand the ports back to Docker's own mesh.")
@click.option("--now", is_flag=True, help="With --release and without a daemon: do not wait for open connections.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the daemon has exited.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Maximum wait in seconds."
)
@daemon_options
def stop(release: bool, now: bool, wait: bool, timeout: float, state_dir: Path, as_json: bool) -> None:
    """Stop the daemon as SIGTERM does: accept no new connections, wait for open ones (at most drain_timeout), exit.

    The kernel engine's programs stay in the kernel and forward by the last tables. After orphan_timeout without a
    daemon they leave new connections to Docker's own mesh by themselves. --release does that at once and removes them,
    even when no daemon runs any more: open connections are waited for unless --now is given. Without a daemon, the pins
    are looked for in the bpf file system that the default configuration file or MESH_BPF_FS names.

    \b
    Exit code: 0 the daemon has exited (or is exiting, with --no-wait); 1 it still runs after --timeout.
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
    stays = holds(state_dir) if wait and gone else ""
    if as_json:
        echo_json({**answer, "gone": gone if wait else None, "programs": stays})
    elif wait:
        pid = answer["pid"]
        click.echo(f"daemon {pid} stopped" if gone else f"daemon {pid} is still draining after {timeout:g} s")
    else:
        click.echo(f"daemon {answer['pid']} is stopping")
    if stays and not as_json:
        click.echo(_stays(stays, release))
    if not gone:
        sys.exit(Exit.NOT_READY)


def _stays(until: str, release: bool) -> str:
    """What a daemon that is gone leaves at work, and how to end it."""
    if release:
        return (
            "open connections still use its eBPF programs, which pass all new ones; `mesh stop --release` again "
            "removes them once those have ended (--now: at once)"
        )
    return (
        f"its eBPF programs forward by the last tables {until}; sources that mesh.allow and mesh.deny shut out stay "
        "shut out; `mesh stop --release` hands back now"
    )


def _clear(state_dir: Path, seconds: float, now: bool, as_json: bool, unreachable: DaemonUnreachableError) -> None:
    """Remove what a kernel engine left whose daemon is gone."""
    try:
        from mesh.datapath.kernel import cleanup  # noqa: PLC0415 -- absent where it was built without libbpf
    except ImportError:
        raise unreachable from None
    stale = cleanup.find(load({"state_dir": str(state_dir)}))
    if stale is None or not (stale.programs or stale.table.exists()):
        _nothing(state_dir, as_json, unreachable)
        return
    lock = Lock.acquire(state_dir)
    try:
        if stale.table.exists():
            stale.table.delete()
        stale.hand_back()
        flows = 0 if now else stale.wait(seconds)
        if stale.programs and not flows:
            stale.take_off()
    finally:
        stale.close()
        lock.close()
    if as_json:
        echo_json({"pid": None, "flows": flows, "gone": not flows})
    elif flows:
        click.echo(f"no daemon ran; the ports are handed back; {flows} flows still use the programs (--now ends them)")
    else:
        click.echo("no daemon ran; its stale programs and pins are removed")
    if flows:
        sys.exit(Exit.NOT_READY)


def _nothing(state_dir: Path, as_json: bool, unreachable: DaemonUnreachableError) -> None:
    """Say that there is nothing to remove, where that is certain."""
    if os.geteuid():  # who may not look cannot say that nothing is there
        raise unreachable
    if state_dir.is_dir():
        Lock.acquire(state_dir).close()  # a daemon that hangs has it
    if as_json:
        echo_json({"pid": None, "flows": 0, "gone": True})
    else:
        click.echo(f"no daemon ran with the state directory {state_dir}, and none has left anything to remove")


def _wait_gone(state_dir: Path, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            call(state_dir, "/readyz", accept=(503,))
        except DaemonUnreachableError:
            return True
        time.sleep(0.1)
    return False
