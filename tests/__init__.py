# SPDX-License-Identifier: Apache-2.0
"""The tests, by what they need.

unit      pure: no process, no root, no Docker, no network beyond loopback; half a minute
bpf       eBPF programs by BPF_PROG_TEST_RUN, and on interfaces in namespaces
engines   both engines, the daemon and the command as processes, in namespaces or on loopback
attacks   what an audit got through with, one attack a module; each runs alone (README.md)
swarm     real dockerds; all modules share one swarm of one, of three and of five nodes, and the agents on them
scenarios golden: what an inventory makes of the kernel engine's maps, as text
guest     Debian's stock kernel in qemu
attacks   what an audit has shown, each in a file that a reader can run against a build
oracle    reference models in plain Python
support   what tests share: lab, daemon, polling, frames

`make test` runs two workers of pytest-xdist. A worker runs a group of tests in sequence: all that share the swarm of
five, all that share the other swarms, or one module (conftest.py). What a test makes is named after its worker's
process id, so workers do not meet. A test waits by tests.support.polling alone, and imports no other test module.
"""
