"""Which addresses may be asked.

A URL of a stranger may name, resolve to or redirect to a machine inside one's own network ("server-side request forgery"): a router, a
database, the metadata service that hands out a cloud machine's credentials. So the address itself is looked at, twice: when a name has
been resolved, and once more as the socket is made, after which nothing can change it. What a URL looks like does not matter then: odd
spellings (0x7f000001, 127.1) are the resolver's to read, and a name that resolves differently the second time is caught at the socket.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

# Beside what the ipaddress module counts as not global: IANA's registries of special-purpose addresses, as of 2025, since older versions of
# the module lack some; and a metadata address that lies among the public ones (Azure's).
_REFUSED = [
    ip_network(n)
    for n in (
        *("0.0.0.0/8", "100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4"),
        *("::/96", "64:ff9b:1::/48", "100::/63", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/9"),
    )
]
_NAT64 = IPv6Network("64:ff9b::/96")

asked_host: ContextVar[str] = ContextVar("asked_host", default="")  # whose connection is being made


class Forbidden(OSError):
    """The address must not be asked. An OSError, as is whatever else keeps a socket from being made."""


class Guard:
    """`allow` names hosts, addresses and networks that may be asked all the same. A host opens its name alone, wherever that leads; an
    address or network opens itself, under any name."""

    def __init__(self, allow: Iterable[str]) -> None:
        self._networks, self._hosts = [], set[str]()
        for entry in allow:
            try:
                self._networks.append(ip_network(entry.strip("[]")))
            except ValueError:
                self._hosts.add(_plain(entry))

    def permits(self, host: str, address: str) -> bool:
        """Whether `address` may be asked for `host`."""
        if _plain(host) in self._hosts:
            return True
        real = _innermost(ip_address(address.partition("%")[0]))
        if any(real in network for network in self._networks):
            return True
        return real.is_global and not (real.is_multicast or real.is_reserved or any(real in network for network in _REFUSED))

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for what getaddrinfo gave. Raises Forbidden: this is the last moment before anything is sent."""
        family, kind, protocol, _, address = info
        if not self.permits(asked_host.get(), address[0]):
            raise Forbidden(f"{address[0]} may not be asked")
        return socket.socket(family, kind, protocol)


def _innermost(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one carries (mapped, 6to4, NAT64), or itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
