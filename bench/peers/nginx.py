# SPDX-License-Identifier: Apache-2.0
"""nginx with the stream module."""

import shutil
from pathlib import Path

from bench.peers.base import Side, first_line

MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


class Nginx(Side):
    name = "nginx"
    label = "nginx stream"

    @classmethod
    def missing(cls) -> str:
        if not shutil.which("nginx"):
            return "nginx is not installed"
        return "" if MODULE.exists() else "nginx's stream module is not installed (libnginx-mod-stream)"

    @classmethod
    def version(cls) -> str:
        return first_line("nginx", "-v")

    def start(self) -> None:
        config = self.render("nginx.conf", module=str(MODULE))
        self.daemon("nginx", "-p", str(self.lab.directory), "-e", "stderr", "-c", config)
