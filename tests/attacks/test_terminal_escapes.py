# SPDX-License-Identifier: Apache-2.0
"""Label names and other nodes' words steer the terminal of whoever reads `mesh status` or the log (item 18).

Whoever may set a label, or runs a node, could clear an operator's screen, forge lines, or have a terminal answer.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from mesh.agent import logging
from mesh.api.app import make_app
from mesh.config.keys import Config
from mesh.text import printable, printable_all
from tests.support.metrics_samples import SampleView, state
from tests.support.process import run_mesh

EVIL = "web\x1b[2J\x1b]0;owned\x07\nready      yes\r\x9b31m\u202ecod\u2066\x7f"
WORDS = ("\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\x7f")

_numbers = itertools.count()


@pytest.mark.parametrize("text", ["web", "naïve 漢字 🙂", "", "a b"])
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


def test_every_other_character_is_an_escape_of_json() -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x200B, 0x2028, 0x202E, 0xD800, 0xE0001):
        text = printable(chr(code))
        assert text.isprintable() and text.isascii()
        assert json.loads(f'"{text}"') == chr(code)
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\u001b"
    assert printable_all({"\x1b": ["\x1b", 1, None, {"a": ("\x07",)}]}) == {
        "\\u001b": ["\\u001b", 1, None, {"a": ["\\u0007"]}]
    }


def evil_state() -> dict[str, Any]:
    found = state()
    found["problems"] = [f"service {EVIL}: no label"]
    for service in found["services"]:
        service["name"] = EVIL
    found["provider"]["error"] = EVIL
    return found


@pytest.mark.parametrize(
    "command",
    [("status",), ("services",), ("backends",), ("status", "--json"), ("services", "--json"), ("nodes",)],
    ids=" ".join,
)
async def test_commands_print_no_escapes(tmp_path: Path, command: tuple[str, ...]) -> None:
    view = SampleView()
    view.state = evil_state  # type: ignore[method-assign]
    view.reasons.append(EVIL)
    runner = web.AppRunner(make_app(view, control=True))
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "mesh.sock")).start()
    try:
        done = await run_mesh(*command, "--state-dir", tmp_path)
    finally:
        await runner.cleanup()
    assert done.out and not any(word in done.out + done.err for word in WORDS)
    assert "\nready      yes" not in done.out
    if "--json" in command:
        done.json()


@pytest.fixture(params=["console", "json", "logfmt"])
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    before = structlog.get_config()
    logging.configure(Config(log_format=request.param))
    yield stream
    structlog.configure(**before)


def test_the_log_has_no_escapes(written: io.StringIO) -> None:
    log = structlog.get_logger("mesh")
    log.warning("label problem", problem=EVIL, nodes=[EVIL], by={EVIL: EVIL}, path=Path("/a\x1b"), count=1)
    log.warning(f"said {EVIL}")
    try:
        raise ValueError(EVIL)
    except ValueError:
        log.exception("internal error")
    text = written.getvalue()
    assert "owned" in text and not any(word in text for word in WORDS)
    assert "\nready      yes" not in text.partition("internal error")[0]


def test_what_libraries_log_is_bounded(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    library = getLogger(f"library.{next(_numbers)}")  # a kind of its own
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for i in range(1000):
        library.error("it fails for %s", f"{EVIL}{i}")
    assert written.getvalue().count("it fails for") == logging.OF_A_KIND
    assert not any(word in written.getvalue() for word in WORDS)
    clock += logging.PERIOD
    library.error("it fails for %s", "one more")
    assert "one more" in written.getvalue() and str(1000 - logging.OF_A_KIND) in written.getvalue()
