# SPDX-License-Identifier: Apache-2.0
"""Both ends close a flow at the same moment, on two CPUs: neither end's close may be lost, or the entry would be taken
for that of a live flow for hours, and refuse the client's port on its way to another address of the cluster."""

from __future__ import annotations

import mmap
import os
import struct

import pytest

from tests.bpf.plane import REDIRECT, Plane
from tests.support.frames import CLIENT4, NODE4, TASK4, segment

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FLOWS = 500
FLAGS, BOTH = 34, 0x0C  # of struct mesh_revnat: where its flags are, MESH_REVNAT_FIN_IN and MESH_REVNAT_FIN_OUT


class Meeting:
    """Two processes that wait for each other before each step."""

    def __init__(self) -> None:
        self._steps = mmap.mmap(-1, 16)

    def wait(self, who: int, step: int) -> None:
        struct.pack_into("=Q", self._steps, 8 * who, step)
        other = 8 * (1 - who)
        while struct.unpack_from("=Q", self._steps, other)[0] < step:
            os.sched_yield()


def test_a_flow_that_both_ends_close_at_once_is_closed(plane: Plane) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("takes two CPUs")
    ports = range(10000, 10000 + FLOWS)
    for port in ports:
        assert plane.run("mesh_ingress", bytes(segment(CLIENT4, port, NODE4, 80, "S"))).retval == REDIRECT
        assert plane.run("mesh_task", bytes(segment(TASK4, 8080, CLIENT4, port, "SA"))).retval == REDIRECT
        assert plane.run("mesh_ingress", bytes(segment(CLIENT4, port, NODE4, 80, "A"))).retval == REDIRECT
    ends = [
        ("mesh_ingress", [bytes(segment(CLIENT4, port, NODE4, 80, "FA")) for port in ports]),
        ("mesh_task", [bytes(segment(TASK4, 8080, CLIENT4, port, "FA")) for port in ports]),
    ]
    meeting = Meeting()

    def close(who: int) -> None:
        program, frames = ends[who]
        for step, frame in enumerate(frames, 1):
            meeting.wait(who, step)
            plane.run(program, frame)

    child = os.fork()
    try:
        os.sched_setaffinity(0, {cpus[1 if child else 0]})
        close(1 if child else 0)
    finally:
        if not child:
            os._exit(0)
        os.sched_setaffinity(0, cpus)
    assert os.waitpid(child, 0)[1] == 0
    _, values = plane.maps["mesh_revnat"].dump()
    size = plane.maps["mesh_revnat"].value_size
    open_yet = sum(values[at + FLAGS] & BOTH != BOTH for at in range(0, len(values), size))
    assert (len(values) // size, open_yet) == (FLOWS, 0)
    assert plane.counts("mesh_fe_metrics", 1)[4:] == (FLOWS, FLOWS)
