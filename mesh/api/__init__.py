# SPDX-License-Identifier: Apache-2.0
"""The HTTP and control API: what a running agent shows, and what it can be told.

`view` is the contract, `state` implements it, `app` has the routes, `server` the sockets.
"""
