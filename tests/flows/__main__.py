# SPDX-License-Identifier: Apache-2.0
"""`make random`: random flows through three nodes, run after run, each with a seed of its own.

python -m tests.flows [--flows N] [--seed N] [--engine kernel|proxy] [--each N] [--datagram BYTES] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tests.flows.run import DATAGRAM, run, show


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.flows", description=__doc__)
    parser.add_argument("--flows", type=int, default=200_000, help="with each engine, in all runs together")
    parser.add_argument("--each", type=int, default=40_000, help="flows of one run")
    parser.add_argument("--seed", type=int, help="of the first run; default: a new one each time")
    parser.add_argument("--engine", choices=("kernel", "proxy"), help="default: one after the other")
    parser.add_argument("--datagram", type=int, default=DATAGRAM, help="bytes of the largest request and answer")
    parser.add_argument("--json", type=Path, help="a line for each run is written here too")
    given = parser.parse_args()
    first = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 31)
    bad = 0
    for engine in (given.engine,) if given.engine else ("kernel", "proxy"):
        flows, seed = 0, first
        while flows < given.flows:
            print(f"--- engine {engine}, seed {seed}", flush=True)
            outcome = run(engine, seed, min(given.each, given.flows - flows), datagram=given.datagram)
            print(show(outcome), flush=True)
            if given.json:
                with given.json.open("a") as out:
                    print(json.dumps(outcome.told()), file=out)
            bad += not outcome.right
            flows += outcome.verdict.flows
            seed += 1
        print(f"--- engine {engine}: {flows} flows, {bad} runs with something wrong so far", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
