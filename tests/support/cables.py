"""Cables between the coordinator and its sites that a test can cut, made of Linux network namespaces.

    north: SuperNode, courier ── wan ══ veth ══ port 0 ─╮
    south: SuperNode, courier ── wan ══ veth ══ port 1 ─┼─ bridge, with the address that the sites dial
    west:  SuperNode, courier ── wan ══ veth ══ port 2 ─╯

A cut disables the port at the bridge: both ends keep interface and address and hear nothing any more, as when a cable
is cut somewhere on the way. Nobody is told that a connection has ended. The loopback interface of a namespace stays,
so that SuperNode and courier go on talking to each other. Needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN.
"""

from __future__ import annotations

import ipaddress
import secrets
import shutil
import subprocess
from collections.abc import Sequence

NETWORKS = ipaddress.ip_network("198.18.0.0/15")
"""Reserved for tests of network devices (RFC 2544, RFC 6890): no route of this machine leads there."""
HOSTS = 16
"""Addresses of one set of cables, with those of the network itself and of broadcast."""
DISABLED, FORWARDING = "0", "3"
"""States of a bridge's port (linux/if_bridge.h). A link taken down instead would take a second to come up again."""


def forbidden() -> str:
    """Why no cables can be laid here, or an empty text."""
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return "network cuts need the programs ip and bridge (iproute2)"
    name = _name()
    try:
        ip("netns", "add", name)
        try:
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "wan", "netns", name)
            ip("link", "add", name, "type", "bridge")
            ip("link", "delete", name)
        finally:
            ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces, veth pairs or bridges here: {error.stderr.strip()}"
    return ""


def ip(*words: str) -> str:
    """A command of ip(8); what it printed. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


class Cables:
    """One bridge, and for each site a namespace and a cable. A context manager: everything is removed at its end.

    Attributes:
        address: what the sites dial; the coordinator listens there.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self._name = _name()
        start = int.from_bytes(secrets.token_bytes(4)) % (NETWORKS.num_addresses // HOSTS) * HOSTS
        self._hosts = [str(NETWORKS[start + number]) for number in range(1, HOSTS - 1)]
        self.address = self._hosts[0]
        if len(sites) >= len(self._hosts):
            raise ValueError(f"at most {len(self._hosts) - 1} sites")
        self._ports = {site: f"{self._name}p{number}" for number, site in enumerate(sites)}

    def prefix(self, site: str) -> list[str]:
        """Words before a command that runs in the site's namespace; ip replaces itself by the command."""
        return ["ip", "netns", "exec", self._namespace(site)]

    def cut(self, site: str) -> None:
        """From now on nothing passes, in either direction."""
        self._port(site, DISABLED)

    def mend(self, *sites: str) -> None:
        """Packets pass again (all sites by default). What was lost is sent again by TCP, when its time has come."""
        for site in sites or self._ports:
            self._port(site, FORWARDING)

    def __enter__(self) -> Cables:
        try:
            ip("link", "add", self._name, "type", "bridge")
            ip("address", "add", f"{self.address}/28", "dev", self._name)
            ip("link", "set", self._name, "up")
            for (site, port), host in zip(self._ports.items(), self._hosts[1:], strict=False):
                self._lay(self._namespace(site), port, host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _port(self, site: str, state: str) -> None:
        words = ["bridge", "link", "set", "dev", self._ports[site], "state", state]
        subprocess.run(words, capture_output=True, check=True)

    def _lay(self, namespace: str, port: str, host: str) -> None:
        ip("netns", "add", namespace)
        ip("link", "add", port, "type", "veth", "peer", "name", "wan", "netns", namespace)
        ip("link", "set", port, "master", self._name, "up")
        ip("-netns", namespace, "address", "add", f"{host}/28", "dev", "wan")
        for interface in ("lo", "wan"):
            ip("-netns", namespace, "link", "set", interface, "up")

    def _remove(self) -> None:
        """Whatever of it is there. A namespace lives as long as a program in it; its cable does not."""
        for site, port in self._ports.items():
            for words in (("link", "delete", port), ("netns", "delete", self._namespace(site))):
                subprocess.run(["ip", *words], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._name], capture_output=True, check=False)

    def _namespace(self, site: str) -> str:
        return f"{self._name}-{site}"


def _name() -> str:
    """Of one set of cables: no other has it, and with a port's number it fits the 15 characters of an interface."""
    return f"cut{secrets.token_hex(4)}"
