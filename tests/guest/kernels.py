# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernels, of this machine's release and of others. Nothing is installed."""

from __future__ import annotations

import lzma
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked Debian kernel package: `image` to boot, `modules` under `root`/lib/modules/`version`."""

    image: Path
    root: Path
    version: str


def debian_kernel(cache: Path, release: str = "") -> Kernel:
    """Fetch Debian's stock kernel with apt into `cache` and unpack it there, once. Nothing is installed.

    Args:
        release: "trixie" and the like, from the mirror that this machine uses; empty: this machine's.

    Raises:
        subprocess.CalledProcessError: apt cannot have it.
    """
    root = cache / "root"
    if not root.exists():
        cache.mkdir(parents=True, exist_ok=True)
        own = platform.freedesktop_os_release()["VERSION_CODENAME"]
        options = () if release in ("", own) else _other_release(cache / "apt", release, own)
        image = _depends(options, "linux-image-amd64", "linux-image-")
        parts = _depends(options, image[0], "linux-binary-", "linux-modules-")  # of 7.2 and later
        fetch = ["apt-get", *options, "-o", "Acquire::Retries=5", "download", image[0], *parts]
        subprocess.run(fetch, cwd=cache, check=True, capture_output=True)
        partial = cache / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        for archive in cache.glob("linux-*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
            archive.unlink()
        if (merged := partial / "usr/lib/modules").exists() and not (partial / "lib/modules").exists():
            shutil.copytree(merged, partial / "lib/modules", symlinks=True)
            shutil.rmtree(merged)
        version = _version(partial)
        subprocess.run(["/sbin/depmod", "-b", partial, version], check=True, capture_output=True)
        partial.rename(root)
    version = _version(root)
    images = (root / f"boot/vmlinuz-{version}", root / f"lib/modules/{version}/vmlinuz")
    return Kernel(next(image for image in images if image.exists()), root, version)


def _version(root: Path) -> str:
    return next((root / "lib/modules").iterdir()).name


def _other_release(directory: Path, release: str, own: str) -> tuple[str, ...]:
    """Options by which apt knows another release, from the mirror of the own one, and nothing of what is installed."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"]
    lines = subprocess.run(targets, check=True, capture_output=True, text=True).stdout.splitlines()
    mirror = next(line.split()[0] for line in lines if line.split()[1] == own)
    for part in ("lists/partial", "cache", "parts"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    (directory / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {release} main\n")
    settings = {
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": directory / "parts",
        "Dir::State::lists": directory / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": directory / "cache",
        "Acquire::Check-Valid-Until": "false",  # snapshots of a mirror
    }
    options = tuple(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))
    subprocess.run(["apt-get", *options, "-o", "Acquire::Retries=5", "update"], check=True, capture_output=True)
    return options


def _depends(options: Iterable[str], package: str, *prefixes: str) -> list[str]:
    """Direct dependencies of a package whose names begin so."""
    command = ["apt-cache", *options, "depends", package]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (line.split()[-1] for line in shown.splitlines() if line.strip().startswith("Depends:"))
    return [name for name in lines if name.startswith(prefixes)]


def module_files(kernel: Kernel, modules: Iterable[str]) -> list[Path]:
    """Files of these modules and all they depend on, each before those that need it; a kernel may lack some."""
    files: dict[Path, None] = {}
    for module in modules:
        shown = subprocess.run(
            ["/sbin/modprobe", "-d", kernel.root, "-S", kernel.version, "--show-depends", module],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for line in shown.splitlines():
            if line.startswith("insmod"):
                files[Path(line.split()[1])] = None
    return list(files)


def copy_module(file: Path, directory: Path) -> str:
    """Copy a module, expanded. Returns its name there."""
    if file.suffix != ".xz":
        shutil.copy(file, directory / file.name)
        return file.name
    (directory / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
    return file.stem
