# SPDX-License-Identifier: Apache-2.0
"""The kernel engine: eBPF programs and their pinned maps.

`engine` is the Datapath. `network` follows netlink and locates backends, `publisher` writes plans to `maps` and
`arenas`, and `hooks` keeps programs attached (`attach`, `xdp`), `keeper` puts back what others take off. `loader` and
`pins` bring programs into the kernel. `restore` and `journal` take over what an earlier process left; `cleanup` removes
it. `fallback` is the proxy for what the programs punt. Only this package imports `mesh._bpf`.
"""
