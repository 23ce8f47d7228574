# SPDX-License-Identifier: Apache-2.0
"""The list of what a release consists of (SBOM), as CycloneDX 1.5: `python deploy/sbom.py > mesh.cdx.json`.

From pyproject.toml, requirements.lock with its hashes, the Debian packages of deploy/Dockerfile and the sources of the
eBPF programs. The same sources give the same list, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
NAMESPACE: Final = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of URLs, RFC 4122
_REQUIREMENT: Final = re.compile(r"(?m)^([\w.-]+)==([^\s;\\]+)(?:\s*;\s*([^\n\\]+?))?\s*\\?\n((?:\s+--hash=\S+.*\n)*)")

Component = dict[str, Any]


def python_packages(lock: str, build_only: frozenset[str]) -> Iterator[Component]:
    """Components of a lock file, each with the hashes of all files of that release.

    Args:
        build_only: names of those that are in no installed mesh.
    """
    for name, version, marker, hashes in _REQUIREMENT.findall(lock):
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        found: Component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        found["scope"] = "excluded" if name.lower() in build_only else "required"
        files = re.findall(r"--hash=sha256:([0-9a-f]{64})", hashes)
        found["externalReferences"] = [
            {
                "type": "distribution",
                "url": f"https://pypi.org/project/{name}/{version}/#files",
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in files],
            }
        ]
        if marker:
            found["properties"] = [{"name": "mesh:marker", "value": marker.strip()}]
        yield found


def debian_packages(dockerfile: str) -> Iterator[Component]:
    """The packages that the runtime stage installs; the image's own list has their versions."""
    stage = dockerfile.rpartition("\nFROM ")[2]
    installed = re.search(r"--no-install-recommends ([^&]+?)\s*\\?\s*&&", stage)
    for name in installed[1].replace("\\", " ").split() if installed else ():
        purl = f"pkg:deb/debian/{name}"
        yield {"type": "library", "bom-ref": purl, "name": name, "purl": purl, "scope": "required"}


def programs(root: Path) -> Iterator[Component]:
    """The eBPF programs, by the digest of their source: they are compiled on the machine that builds mesh."""
    for path in sorted(root.glob("bpf/*.bpf.c")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        name = path.relative_to(root).as_posix()
        yield {
            "type": "file",
            "bom-ref": name,
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
            "licenses": [{"expression": "GPL-2.0-only OR BSD-2-Clause"}],
        }


def sbom(root: Path = ROOT) -> Component:
    """The whole document."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    build = {re.split(r"[<>=]", each)[0].lower() for each in project["optional-dependencies"]["build"]}
    components = [
        *python_packages((root / "requirements.lock").read_text(), frozenset(build)),
        *debian_packages((root / "deploy" / "Dockerfile").read_text()),
        *programs(root),
    ]
    name, version = project["name"], project["version"]
    purl = f"pkg:generic/{name}@{version}"
    serial = uuid.uuid5(NAMESPACE, json.dumps(components, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "purl": purl,
                "licenses": [{"expression": project["license"]}],
            }
        },
        "components": components,
        "dependencies": [{"ref": purl, "dependsOn": [each["bom-ref"] for each in components]}],
    }


if __name__ == "__main__":
    json.dump(sbom(), sys.stdout, indent=2)
    sys.stdout.write("\n")
