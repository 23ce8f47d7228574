# SPDX-License-Identifier: Apache-2.0
"""Another user prepares the state directory: a link in the lock's place truncates any file, and its owner commands the
daemon (item 19)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.agent.lock import Lock
from mesh.agent.takeover import Successor
from mesh.errors import MeshError
from mesh.model import EngineKind

OTHER = 65534


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    state = tmp_path / "state"
    state.mkdir(0o700)
    (state / "lock").symlink_to(target)
    with pytest.raises(MeshError, match=r"symbolic link.*remove it"):
        Lock.acquire(state)
    assert target.read_text() == "precious"


def test_a_link_to_nothing_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(MeshError, match="symbolic link"):
        Lock.acquire(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_pipe_does_not_stop_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(MeshError, match="is no file"):
        Lock.acquire(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o707])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    for use in (Lock.acquire, lambda path: Successor.connect(path, EngineKind.PROXY)):
        with pytest.raises(MeshError, match=r"others may write in it.*chmod go-w.*--state-dir"):
            use(state)
    assert not list(state.iterdir())


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(0o700)
    os.chown(state, OTHER, OTHER)
    for use in (Lock.acquire, lambda path: Successor.connect(path, EngineKind.PROXY)):
        with pytest.raises(MeshError, match=f"belongs to the user with id {OTHER}"):
            use(state)
    assert not list(state.iterdir())


def test_an_ordinary_directory_is_taken(tmp_path: Path) -> None:
    for mode in (0o700, 0o755, 0o750):
        state = tmp_path / f"{mode:o}"
        state.mkdir()
        state.chmod(mode)
        Lock.acquire(state).close()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(state)  # of the directory itself: whose it is, is looked at
        Lock.acquire(tmp_path / "link").close()
