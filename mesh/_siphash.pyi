# SPDX-License-Identifier: Apache-2.0
from typing import Final

KEY_SIZE: Final[int]

def siphash(key: bytes, data: bytes) -> int: ...
