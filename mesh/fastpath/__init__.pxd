# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The parts of `mesh._fastpath`, one responsibility each: inline C-level functions, compiled into that one extension.

Order of use: sys (the kernel's interface) <- types (all structs) <- pool (memory), watch (events) <- select (which backend)
<- proxyproto, peerproto <- conns, sessions (where they are kept) <- stream (moving bytes) <- tcp (connections), udp (sessions)
<- accept (their beginning) <- worker (the loop of one thread). For Python: tables (what threads read), counts.
"""
