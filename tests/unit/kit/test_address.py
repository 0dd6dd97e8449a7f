"""Claims about the addresses of several processes as one gRPC target."""

from __future__ import annotations

import pytest

from honed.kit.address import host_port, join, joined_hosts, resolved


def test_an_ipv6_address_stands_in_brackets_before_its_port() -> None:
    assert host_port("127.0.0.1", 4100) == "127.0.0.1:4100"
    assert host_port("::1", 4100) == host_port("[::1]", 4100) == "[::1]:4100"
    assert host_port("honed.internal", 4100) == "honed.internal:4100"


@pytest.mark.parametrize(
    ("hosts", "target"),
    [
        (("10.0.0.1", "10.0.0.2"), "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (("::1", "[fd00::2]"), "ipv6:[::1]:1,[fd00::2]:2"),
        (("10.0.0.1", "fd00::2"), "ipv6:[::ffff:10.0.0.1]:1,[fd00::2]:2"),
        (("localhost", "127.0.0.2"), "ipv4:127.0.0.1:1,127.0.0.2:2"),
    ],
)
def test_addresses_and_names_are_joined_into_one_target_of_one_family(hosts: tuple[str, str], target: str) -> None:
    assert join([(hosts[0], 1), (hosts[1], 2)]) == target
    assert joined_hosts(target) == [resolved(host)[1] for host in hosts]


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(OSError):
        join([("no-such-host.invalid", 1), ("127.0.0.1", 2)])
    with pytest.raises(ValueError, match="valid on one network interface only"):
        join([("fe80::1%1", 1), ("127.0.0.1", 2)])


@pytest.mark.parametrize("target", ["127.0.0.1:4100", "[::1]:4100", "dns:///honed:4100", "ipv4:10.0.0.1:1"])
def test_a_target_of_one_process_joins_nothing(target: str) -> None:
    assert joined_hosts(target) == []
