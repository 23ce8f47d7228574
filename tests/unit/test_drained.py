# SPDX-License-Identifier: Apache-2.0
"""What an operator's word for a node or a backend means."""

from __future__ import annotations

import pytest

from mesh.api.drained import find
from mesh.errors import MeshError

NODES = {"abc1": "one", "axd2": "two", "x3": "two"}


@pytest.mark.parametrize(("name", "identity"), [("abc1", "abc1"), ("one", "abc1"), ("axd", "axd2"), ("x", "x3")])
def test_an_id_a_name_or_the_beginning_of_an_id(name: str, identity: str) -> None:
    assert find("node", name, NODES) == identity


@pytest.mark.parametrize("name", ["a", "two"])
def test_what_may_mean_two_is_refused(name: str) -> None:
    with pytest.raises(MeshError, match="is ambiguous"):
        find("node", name, NODES)


@pytest.mark.parametrize("kind", ["node", "backend"])
def test_who_names_none_is_told_which_command_lists_them(kind: str) -> None:
    with pytest.raises(MeshError) as refused:
        find(kind, "nine", NODES)
    assert refused.value.remedy == f"`mesh {kind}s` lists them"
