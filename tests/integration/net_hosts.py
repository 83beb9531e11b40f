"""Two hosts on one machine: network namespaces joined by a cable, each with an address, a name and a loopback device.

A process in one reaches the other through 10.x.y.1 and .2 alone; files are shared, as on a cluster with a network
file system.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from types import TracebackType


def unavailable() -> str | None:
    """Why namespaces cannot be made here, None where they can."""
    name = f"fira-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
    except (OSError, RuntimeError) as error:
        return f"needs network namespaces (root and iproute2): {error}"
    _ip("netns", "delete", name)
    return None


class NetHosts:
    """A context in which `run_in(index, command)` is a command line that runs on host 0 or 1."""

    def __init__(self) -> None:
        token = secrets.token_hex(3)
        self.names = [f"fira-{token}-{index}" for index in range(2)]
        # Of the tests' own kind (10.128 to 10.255), at random: two runs on one machine stay apart.
        network = f"10.{128 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        self.addresses = [f"{network}.{index + 1}" for index in range(2)]

    def __enter__(self) -> NetHosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            # Inside the first namespace, so that nothing of it shows on the machine.
            first, second = self.names
            _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", link, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def run_in(self, index: int, command: list[str]) -> list[str]:
        """`command` on host `index`, under that host's own name."""
        name = self.names[index]
        return [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name} && exec "$@"',
            "sh",
            *command,
        ]


def _ip(*arguments: str) -> None:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
