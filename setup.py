# SPDX-License-Identifier: Apache-2.0
"""Build of the extensions and of the eBPF objects. Metadata is in pyproject.toml.

CLANG names the compiler for eBPF (default: clang-16, which is Debian 12's newest, else clang).
MESH_SANITIZE=address|thread|undefined builds the extensions with that sanitizer (tests run them so: `make sanitize`).
"""

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HEADERS = [f"bpf/include/mesh/{name}.h" for name in ("abi", "geneve", "hash")]
# A compiled extension does not notice a changed header or declaration by itself.
DECLARATIONS = sorted(str(path) for suffix in ("pxd", "h") for path in Path("mesh").rglob(f"*.{suffix}"))
LIBRARIES = {"mesh._bpf": ["bpf", "elf", "z"], "mesh.fastpath.worker": ["pthread"], "mesh._fastpath": ["pthread"]}
SANITIZE = os.environ.get("MESH_SANITIZE", "")


def abi_digest() -> str:
    """Digest of the contract's headers: compiled into every artefact and compared when one opens the other."""
    return hashlib.sha256(b"".join(Path(h).read_bytes() for h in HEADERS)).hexdigest()[:16]


def extension(source: Path) -> Extension:
    name = ".".join(source.with_suffix("").parts)
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
    return Extension(
        name,
        [str(source)],
        include_dirs=["bpf/include", "."],
        depends=HEADERS + DECLARATIONS + ["bpf/include/mesh/siphash.h"],
        libraries=LIBRARIES.get(name, []),
        define_macros=[("MESH_ABI_DIGEST", f'"{abi_digest()}"'), ("_GNU_SOURCE", "1")],
        extra_compile_args=["-O1" if SANITIZE else "-O3", "-g", "-std=gnu11", "-Wall", *sanitize],
        extra_link_args=sanitize,
    )


def clang() -> str:
    """The compiler for eBPF."""
    names = [os.environ["CLANG"]] if os.environ.get("CLANG") else ["clang-16", "clang"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise SystemExit(
        f"setup.py: {' or '.join(names)} not found; it compiles the programs of the kernel engine: "
        "install clang (Debian 12: clang-16), or name yours in CLANG"
    )


def build_objects() -> None:
    """bpf/*.bpf.c -> mesh/datapath/kernel/objects/*.bpf.o, those that are older than a source."""
    headers = list(Path("bpf").rglob("*.h"))
    target = Path("mesh/datapath/kernel/objects")
    target.mkdir(exist_ok=True)
    digest = abi_digest()
    for source in sorted(Path("bpf").glob("*.bpf.c")):
        output = target / source.with_suffix(".o").name
        newest = max(p.stat().st_mtime_ns for p in [source, *headers, Path("setup.py")])
        if output.exists() and output.stat().st_mtime_ns > newest:
            continue
        multiarch = sysconfig.get_config_var("MULTIARCH")
        system = ["-idirafter", f"/usr/include/{multiarch}"] if multiarch else []  # asm/types.h
        partial = output.with_suffix(".partial")
        command = [clang(), "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", "-Wpadded"]
        command += ["-Ibpf", "-Ibpf/include", *system, f'-DMESH_ABI_DIGEST="{digest}"']
        try:
            subprocess.run([*command, "-c", str(source), "-o", str(partial)], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(f"setup.py: {source} does not compile (it needs libbpf-dev, linux-libc-dev)") from None
        partial.rename(output)


class BuildExtensions(build_ext):
    """Extensions, and the objects for builds in place."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def run(self) -> None:
        build_objects()
        super().run()


class BuildPython(build_py):
    """Modules and package data, the objects being data."""

    def run(self) -> None:
        build_objects()
        self.__dict__.pop("data_files", None)  # listed anew, the objects included
        super().run()


setup(
    ext_modules=cythonize(
        [extension(path) for path in sorted(Path("mesh").rglob("*.pyx"))],
        compiler_directives={"language_level": "3"},
        build_dir="build/cython",
        emit_linenums=True,  # gdb, perf and compiler warnings name lines of the .pyx files
    ),
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
)
