# SPDX-License-Identifier: Apache-2.0
"""Counters that have grown lately: named after more than a few, for a while, and not for what was before."""

from __future__ import annotations

from mesh.datapath.kernel.lately import LATELY, Lately


def test_more_than_a_few_are_named_for_a_while() -> None:
    lately: Lately[str] = Lately(3)
    assert list(lately.look({"a": 2, "b": 0}, 0.0)) == []
    assert list(lately.look({"a": 3, "b": 0}, 10.0)) == [("a", 3, 3)]
    assert list(lately.look({"a": 3, "b": 0}, 10.0 + LATELY - 1)) == [("a", 3, 3)]
    assert list(lately.look({"a": 3, "b": 0}, 10.0 + LATELY)) == []
    assert list(lately.look({"a": 5, "b": 0}, 200.0)) == []  # a few once more
    assert list(lately.look({"a": 7, "b": 0}, 201.0)) == [("a", 7, 4)]


def test_what_was_before_is_not_of_now() -> None:
    lately = Lately(3, {"a": 100})
    assert list(lately.look({"a": 102}, 0.0)) == []
    assert list(lately.look({"a": 103}, 1.0)) == [("a", 103, 3)]
    assert list(lately.look({}, 2.0)) == list(lately.look({"a": 1}, 3.0)) == []
