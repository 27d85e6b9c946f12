"""Hosts that images may be fetched from: names, and addresses that are not public.

A name is trusted to say what an image is, not where this server may reach: whatever it points to,
an address that is private, loopback or otherwise not of the internet is connected to only where
it is listed itself. Nothing here looks a name up or opens a connection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9])?)*"
)
_LOCAL = "localhost"  # by definition this very machine, so that to list it is to list that
# IPv6 addresses with one of IPv4 inside, to which a gateway may hand on: 6to4, Teredo, NAT64.
_TUNNELS = tuple(IPv6Network(each) for each in ("2002::/16", "2001::/32", "64:ff9b::/96"))


@dataclass(frozen=True, slots=True)
class Hosts:
    """What the operator lists: `images.example.com,10.0.0.0/8`."""

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Hosts:
        """Raises ValueError, naming the entry that is wrong."""
        names: list[str] = []
        networks: list[Network] = []
        for entry in filter(None, (each.strip().lower() for each in text.split(","))):
            try:
                networks.append(ip_network(entry))
            except ValueError:
                # What ends in a number is an address to some, and a name to nobody.
                if not _NAME.fullmatch(entry) or entry.rpartition(".")[2].isdigit():
                    raise ValueError(
                        "a host is a name (images.example.com), an address (10.0.0.5) or a "
                        f"network (10.0.0.0/8), without scheme, port or '*'; got {entry!r}"
                    ) from None
                names.append(entry)
        return cls(frozenset(names), tuple(networks))

    def lists(self, host: str) -> bool:
        """Whether a caller may name this host."""
        address = _address(host)
        return host in self.names if address is None else self._holds(address)

    def admits(self, host: str, address: str) -> bool:
        """Whether this address may be connected to, given that a caller named that host."""
        found = ip_address(address)
        mapped = getattr(found, "ipv4_mapped", None)
        at = mapped or found
        if self._holds(at):
            return True
        if at.is_loopback:
            return host == _LOCAL and host in self.names
        tunnelled = any(at in network for network in _TUNNELS)
        return at.is_global and not at.is_multicast and not tunnelled

    def _holds(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def _address(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
