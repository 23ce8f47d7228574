# SPDX-License-Identifier: Apache-2.0
"""The kernel engine: eBPF programs and their pinned maps.

`engine` is the Datapath; `maps` and `arenas` hold the tables; `loader`, `attach` and `pins` bring programs into the
kernel; `restore` and `journal` take over what an earlier process left, and `cleanup` takes it off.
Only this package imports `mesh._bpf`. Maps are pinned and have one writer; their layout is bpf/include/mesh/abi.h.
"""
