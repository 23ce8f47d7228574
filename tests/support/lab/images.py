# SPDX-License-Identifier: Apache-2.0
"""Images without a registry: root file systems as tar files, cached under build/ by the digest of what went in."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
CACHE = ROOT / "build" / "lab"
SOURCE = Path(__file__).parent / "images"
VOTING = Path(__file__).parent / "voting"

HTTP_PORT, ECHO_PORT, UDP_PORT = 8080, 8081, 8082
"""Where the stand-in server listens (images/server.c)."""


@dataclass(frozen=True)
class Image:
    """A root file system and the Dockerfile instructions that `docker import` applies to it."""

    tag: str
    tar: Path
    changes: tuple[str, ...] = field(default=())


def _cached(name: str, key: str, build: object) -> Path:
    path = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.tar"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            root = Path(scratch) / "root"
            root.mkdir()
            assert callable(build)
            build(root)
            draft = Path(scratch) / "image.tar"
            with tarfile.open(draft, "w") as tar:
                tar.add(root, arcname=".")
            draft.replace(path)  # parallel runs build the same file
    return path


def _static(name: str, source: Path) -> Path:
    """Root file system of one static binary: all C files of a directory."""
    sources = sorted(source.glob("*.c"))

    def build(root: Path) -> None:
        command = ["gcc", "-static", "-O2", "-Wall", "-Werror", "-D_GNU_SOURCE", "-pthread", "-o", str(root / name)]
        subprocess.run([*command, *map(str, sources)], check=True)

    return _cached(name, "".join(p.read_text() for p in sorted(source.iterdir())), build)


@cache
def server() -> Path:
    """Root file system of the stand-in server."""
    return _static("server", SOURCE)


@cache
def voting_images() -> tuple[Image, ...]:
    """Stand-ins for the images of deploy/voting-app.yml, by their own names; `vote` also with the tag `next`."""
    roles = {
        "bretfisher/examplevotingapp_vote": "vote",
        "bretfisher/examplevotingapp_vote:next": "vote",
        "redis:3.2": "redis",
        "bretfisher/examplevotingapp_worker": "worker",
        "postgres:9.4": "db",
        "bretfisher/examplevotingapp_result": "result",
    }
    root = _static("voting", VOTING)
    return tuple(Image(tag, root, (f'CMD ["/voting", "{role}"]',)) for tag, role in roles.items())


def server_images() -> tuple[Image, ...]:
    """What every node gets: mesh-lab/server:1 and :2 (the same, for rolling updates), :health (with a HEALTHCHECK)."""
    run = 'CMD ["/server"]'
    check = 'HEALTHCHECK --interval=500ms --timeout=60s --retries=1 CMD ["/server", "--check"]'
    return (
        Image("mesh-lab/server:1", server(), (run,)),
        Image("mesh-lab/server:2", server(), (run, "LABEL version=2")),
        Image("mesh-lab/server:health", server(), (run, check)),
    )


def of_binaries(tag: str, binaries: list[str], command: str, files: Mapping[str, str] | None = None) -> Image:
    """An image of this machine's own binaries with the libraries they need (for nginx, haproxy, ... as backends).

    Args:
        tag: name of the image, with tag.
        binaries: paths or names on PATH; each lies at the same path in the image.
        command: a Dockerfile CMD instruction's argument.
        files: further files, by path in the image.
    """
    paths = {os.path.realpath(shutil.which(b) or b): shutil.which(b) or b for b in binaries}

    def build(root: Path) -> None:
        wanted = dict(paths)
        for binary in paths:
            for word in subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout.split():
                if word.startswith("/"):
                    wanted[os.path.realpath(word)] = word
        for source, name in wanted.items():
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        for name in ("tmp", "run", "var/log", "var/lib", "etc"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "etc/passwd").write_text("root:x:0:0::/:/none\nnobody:x:65534:65534::/:/none\n")
        (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        for name, text in (files or {}).items():
            (root / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (root / name.lstrip("/")).write_text(text)

    stamps = [f"{p}:{Path(p).stat().st_mtime_ns}" for p in paths]
    key = "\n".join([*stamps, *(f"{n}={t}" for n, t in sorted((files or {}).items()))])
    return Image(tag, _cached(tag.replace("/", "-").replace(":", "-"), key, build), (f"CMD {command}",))


def pattern(length: int) -> bytes:
    """The bytes that the stand-in server answers to GET /bytes?n=<length>."""
    block, x = bytearray(65536), 1
    for i in range(len(block)):
        x = (x * 1103515245 + 12345) & 0xFFFFFFFF
        block[i] = x >> 16 & 0xFF
    return (bytes(block) * (length // len(block) + 1))[:length]
