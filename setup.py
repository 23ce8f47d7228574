# SPDX-License-Identifier: Apache-2.0
"""Build of the extensions. Metadata is in pyproject.toml.

MESH_SANITIZE=address|thread|undefined builds the extensions with that sanitizer (tests run them so: `make sanitize`).
"""

import hashlib
import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HEADERS = ["bpf/include/mesh/abi.h", "bpf/include/mesh/hash.h"]
SANITIZE = os.environ.get("MESH_SANITIZE", "")


def abi_digest() -> str:
    """Digest of the contract's headers: compiled into every artefact and compared when one opens the other."""
    return hashlib.sha256(b"".join(Path(h).read_bytes() for h in HEADERS)).hexdigest()[:16]


def extension(name: str, libraries: tuple[str, ...] = ()) -> Extension:
    # A compiled extension does not notice a changed header by itself: list them.
    depends = [*HEADERS, *(str(p) for p in sorted(Path("mesh").rglob("*.pxd")))]
    sanitize = [f"-fsanitize={SANITIZE}", "-g", "-fno-omit-frame-pointer"] if SANITIZE else []
    return Extension(
        f"mesh.{name}",
        [f"mesh/{name}.pyx"],
        include_dirs=["bpf/include"],
        depends=depends,
        libraries=list(libraries),
        define_macros=[("MESH_ABI_DIGEST", f'"{abi_digest()}"'), ("_GNU_SOURCE", "1")],
        extra_compile_args=["-O2" if SANITIZE else "-O3", "-std=gnu11", "-Wall", "-Wno-unused-function", *sanitize],
        extra_link_args=sanitize,
    )


NAMES: dict[str, tuple[str, ...]] = {"_maglev": (), "_fastpath": ("pthread",), "_bpf": ("bpf", "elf", "z")}
setup(
    ext_modules=cythonize(
        [extension(name, libs) for name, libs in NAMES.items() if Path(f"mesh/{name}.pyx").exists()],
        compiler_directives={"language_level": "3"},
        build_dir="build/cython",
    ),
)
