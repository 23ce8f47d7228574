# SPDX-License-Identifier: Apache-2.0
"""Run the daemon in a network namespace, and remove that: its pins hold 156 MiB for ever, time after time (issue 12,
item 21).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.config.keys import Config
from mesh.datapath.kernel import namespaces
from mesh.datapath.kernel.cleanup import collect_gone, gone_instances
from mesh.datapath.kernel.namespaces import living_cookies
from mesh.datapath.kernel.pins import netns_cookie
from tests.engines.kernel_driver import Driver
from tests.engines.kernel_plane import Plane
from tests.support.lab.netns import Lab
from tests.support.polling import wait_for

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def may_see(pid: str) -> bool:
    """Some sandboxes hide their first process from root."""
    try:
        return bool(Path(f"/proc/{pid}/ns/net").stat())
    except OSError:
        return False


@pytest.mark.parametrize("sees_processes", [True, False])
def test_pins_go_with_their_namespace_and_no_sooner(sees_processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sees_processes:
        monkeypatch.setattr(namespaces, "INITIAL_PIDS", 0)
    processes = namespaces._processes
    monkeypatch.setattr(namespaces, "_processes", lambda: [pid for pid in processes() if may_see(pid)])
    if sees_processes:
        wait_for(living_cookies, "a moment in which no other test's namespaces come and go")
    else:
        assert living_cookies() is None
    with Lab() as lab:
        plane = Plane(lab, backends=1)
        engine: Driver = plane.driver()
        engine.open()
        engine.serve(services=[plane.web("b1")])
        config = Config(state_dir=str(lab.directory / "other"), bpf_fs=str(plane.bpffs))
        home = next((plane.bpffs / "mesh").iterdir())
        assert gone_instances(config) == []
        engine.kill()
        with plane.node.entered():
            own = netns_cookie()
        if sees_processes:
            assert own in wait_for(living_cookies, "likewise")
        assert gone_instances(config) == [], "the namespace is there, whoever runs in it"
        plane.node.delete()
        assert wait_for(lambda: collect_gone(config), "the kernel has removed the namespace") == [home]
        assert list((plane.bpffs / "mesh").iterdir()) == []
        assert collect_gone(config) == []


def test_a_process_from_which_others_are_hidden_cannot_tell() -> None:
    """As with ProtectProc=ptraceable of systemd: the namespaces of all that it does not see would count as gone."""
    ask = "from mesh.datapath.kernel.namespaces import living_cookies; print(living_cookies())"
    script = 'mount -t proc -o hidepid=ptraceable proc /proc && exec setpriv --bounding-set=-sys_ptrace "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
