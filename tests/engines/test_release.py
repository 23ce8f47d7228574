# SPDX-License-Identifier: Apache-2.0
"""What a release is accompanied by: the list of its components, checksums and a signature that can be verified."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sbom() -> str:
    done = subprocess.run([sys.executable, "deploy/sbom.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_list_has_everything_that_is_locked() -> None:
    found = json.loads(sbom())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    named = {each["name"]: each for each in found["components"]}
    locked = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text())
    assert len(locked) > 15
    for name, version in locked:
        component = named[name]
        assert component["version"] == version
        assert component["externalReferences"][0]["hashes"]
        assert component["scope"] == ("excluded" if name in ("cython", "setuptools") else "required")
    assert {"libbpf1", "python3", "nftables"} <= named.keys()
    assert {f"bpf/{kind}.bpf.c" for kind in ("ingress", "task", "socket", "xdp")} <= named.keys()
    references = [each["bom-ref"] for each in found["components"]]
    assert len(references) == len(set(references))


def test_the_same_sources_give_the_same_list() -> None:
    assert sbom() == sbom()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_a_signed_release_is_verified_as_the_document_says(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    subprocess.run(["make", "-s", "release", f"DIST={tmp_path}", f"KEY={key}"], cwd=ROOT, check=True)
    (tmp_path / "allowed_signers").write_text(f"releases@mesh {(tmp_path / 'key.pub').read_text()}")
    commands = re.findall(r"(?m)^(ssh-keygen -Y verify .*|sha256sum -c .*)$", (ROOT / "SECURITY.md").read_text())
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "SHA256SUMS").write_text("forged")
    done = subprocess.run(["sh", "-c", commands[0]], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode


def test_the_images_base_can_be_given_by_digest() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("FROM")} == {"${DEBIAN}"}
