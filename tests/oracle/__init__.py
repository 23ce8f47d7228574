# SPDX-License-Identifier: Apache-2.0
"""Reference models in plain Python, written from the papers and RFCs: what the engines must do."""
