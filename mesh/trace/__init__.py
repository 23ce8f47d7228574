# SPDX-License-Identifier: Apache-2.0
"""`mesh trace`: which task each new connection goes to, and why, as it happens.

`kernel` has facts about the running kernel, `program` the tracing program that is built of them, `connections` runs it
(root, and Debian's python3-bpfcc). Reads only: nothing that it loads decides over packets, and all of it goes with it.
May import engines and what is below; only `mesh.cli` imports it.
"""
