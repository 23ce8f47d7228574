# SPDX-License-Identifier: Apache-2.0
"""What tests share: namespaces and swarms, daemons, peers, frames, samples. Holds no test."""
