"""Addresses of services as gRPC targets: of one process, or of several joined into one.

A joint target (`ipv4:10.0.0.1:4100,10.0.0.2:4100`) holds IP addresses only, since gRPC looks up no
names in it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

_SCHEMES: Final = ("ipv4:", "ipv6:")


def host_port(host: str, port: int) -> str:
    """`host:port`, where an IPv6 address stands in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{host}:{port}"


def resolved(host: str) -> tuple[socket.AddressFamily, str]:
    """The family and the IP address of a host; of a name with both families, the IPv4 address.

    Raises:
        OSError: the name has no address.
    """
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    scope = address[3] if len(address) == 4 else 0
    return family, f"{address[0]}%{scope}" if scope and "%" not in str(address[0]) else str(address[0])


def is_ip(host: str) -> bool:
    """Whether the host is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def check_collector(url: str) -> None:
    """Asserts that a URL can be a collector's of OTLP over gRPC.

    Raises:
        ValueError: it cannot; says what is wrong, and repeats nothing that may be a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user and no password: put what the collector asks for into telemetry.headers_file")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must be http://HOST:PORT (plain text) or https://HOST:PORT (TLS)")
    if port is None:
        raise ValueError("has no port: collectors take OTLP over gRPC on 4317")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must end with the port: OTLP goes over gRPC here, which has no path (that is OTLP over HTTP)")


def join(addresses: Sequence[tuple[str, int]]) -> str:
    """One gRPC target of several processes, each (host, port); a channel spreads its calls over them.

    Names are looked up here. Where both families occur, IPv4 addresses take their IPv6 form
    (`::ffff:10.0.0.1`), because a target is of one family.

    Raises:
        OSError: a name has no address.
        ValueError: an address cannot stand in a target.
    """
    found = [(ipaddress.ip_address(resolved(host)[1]), port) for host, port in addresses]
    for address, _ in found:
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
            raise ValueError(f"{address} is valid on one network interface only, so it cannot be joined with others")
    if all(address.version == 4 for address, _ in found):
        return _SCHEMES[0] + ",".join(f"{address}:{port}" for address, port in found)
    six = [(f"::ffff:{address}" if address.version == 4 else str(address), port) for address, port in found]
    return _SCHEMES[1] + ",".join(host_port(address, port) for address, port in six)


def joined_hosts(target: str) -> list[str]:
    """The IP addresses in a joint target; none in any other target."""
    if not target.startswith(_SCHEMES) or "," not in target:
        return []
    hosts = (part.rpartition(":")[0].strip("[]") for part in target.partition(":")[2].split(","))
    return [host.removeprefix("::ffff:") if "." in host else host for host in hosts]


def cannot_listen(host: str, port: int, what: str) -> OSError:
    """The error of a port that `what` does not get."""
    return OSError(f"cannot listen on {host_port(host, port)} for {what}: is the port taken by another run?")
