# SPDX-License-Identifier: Apache-2.0
"""The proxy engine: threads in Cython that relay connections and datagrams.

`engine` is the Datapath; `listeners` and `nft` get connections, `peers` reaches other nodes, `accounting` keeps the
counters. Only this package imports `mesh._fastpath`.
"""
