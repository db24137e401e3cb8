from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.fetch.addresses import Forbidden, Guard, asked_host

PUBLIC = [
    "93.184.216.34",
    "8.8.8.8",
    "100.63.0.1",
    "100.128.0.1",
    "172.32.0.1",
    "2606:4700::1111",
    "2001:4860:4860::8888",
    "::ffff:8.8.8.8",
]
PRIVATE = [
    "127.0.0.1",
    "127.255.0.3",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "100.64.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "168.63.129.16",
    "192.88.99.1",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:7f00:1::1",
    "2002:a9fe:a9fe::",
    "2001::1",
    "2001:db8::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "100::1",
    "5f00::1",
    "3fff::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_be_asked(address: str) -> None:
    assert Guard([]).permits("a.example", address)


@pytest.mark.parametrize("address", PRIVATE)
def test_all_others_may_not_whatever_they_are_wrapped_in(address: str) -> None:
    assert not Guard([]).permits("a.example", address)


@given(
    st.ip_addresses(v=4, network="10.0.0.0/8")
    | st.ip_addresses(v=4, network="127.0.0.0/8")
    | st.ip_addresses(v=4, network="169.254.0.0/16")
)
def test_a_private_address_stays_private_inside_another(address: object) -> None:
    number = int(address)  # type: ignore[call-overload]
    guard = Guard([])
    for high, low in ((0xFFFF << 32, 0), (0x64FF9B << 96, 0), (0x2002 << 112, 80)):
        assert not guard.permits("", socket.inet_ntop(socket.AF_INET6, (high | number << low).to_bytes(16, "big")))


def test_what_is_allowed_is_opened_and_nothing_beside_it() -> None:
    guard = Guard(["10.1.0.0/16", "127.0.0.1", "[::1]", "intranet.lab"])
    assert guard.permits("any.example", "10.1.2.3") and not guard.permits("any.example", "10.2.0.1")
    assert guard.permits("", "127.0.0.1") and guard.permits("", "::ffff:127.0.0.1") and not guard.permits("", "127.0.0.2")
    assert guard.permits("", "::1") and not guard.permits("", "::2")
    assert guard.permits("Intranet.Lab.", "192.168.0.1") and not guard.permits("other.lab", "192.168.0.1")
    assert not guard.permits("evil.intranet.lab", "192.168.0.1")


def test_a_socket_is_made_only_for_the_host_that_is_allowed_it() -> None:
    guard = Guard(["intranet.lab"])
    info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.5", 80))
    with pytest.raises(Forbidden):
        guard.open_socket(info)
    token = asked_host.set("intranet.lab")
    try:
        guard.open_socket(info).close()
    finally:
        asked_host.reset(token)
