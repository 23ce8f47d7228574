# SPDX-License-Identifier: Apache-2.0
"""What somebody else removes is counted and told once, and named until it is put back."""

from __future__ import annotations

from structlog.testing import capture_logs

from mesh.datapath.losses import Losses
from mesh.errors import DatapathError


class Thing:
    """Of ours in the kernel."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.obstacle = ""

    def lost(self) -> list[str]:
        return sorted(self.gone)

    def restore(self) -> None:
        if self.obstacle:
            raise DatapathError(self.obstacle)
        self.gone.clear()


def test_a_loss_is_counted_and_told_once_and_is_named_until_it_is_back() -> None:
    losses, thing = Losses(), Thing()
    losses.check("a", thing.lost, thing.restore)
    assert (losses.count, losses.missing) == (0, [])
    thing.gone, thing.obstacle = {"table", "hook"}, "no permission"
    with capture_logs() as told:
        for _ in range(3):
            losses.check("a", thing.lost, thing.restore)
    assert losses.count == 2
    assert losses.missing == [
        f"{name} was removed by somebody else, and cannot be put back: no permission" for name in ("hook", "table")
    ]
    assert [(line["log_level"], line.get("what")) for line in told] == [
        ("warning", "hook"),
        ("warning", "table"),
        ("error", ["hook", "table"]),
    ]
    thing.obstacle = ""
    with capture_logs() as told:
        losses.check("a", thing.lost, thing.restore)
        losses.check("a", thing.lost, thing.restore)
    assert (losses.count, losses.missing) == (2, [])
    assert told == [{"event": "in the kernel again", "log_level": "info", "what": ["hook", "table"]}]
    thing.gone = {"hook"}
    losses.check("a", thing.lost, thing.restore)
    assert (losses.count, losses.missing) == (3, [])


def test_one_part_knows_nothing_of_another() -> None:
    losses, one, other = Losses(), Thing(), Thing()
    one.gone, one.obstacle, other.gone = {"table"}, "no nft", {"socket"}
    losses.check("one", one.lost, one.restore)
    losses.check("other", other.lost, other.restore)
    assert losses.count == 2
    assert losses.missing == ["table was removed by somebody else, and cannot be put back: no nft"]


def test_what_comes_back_by_itself_is_told() -> None:
    losses, thing = Losses(), Thing()
    thing.gone, thing.obstacle = {"table"}, "no nft"
    losses.check("a", thing.lost, thing.restore)
    thing.gone = set()
    losses.check("a", thing.lost, thing.restore)
    assert losses.missing == []
