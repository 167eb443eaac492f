import ipaddress

import pytest
from cryptography import x509

from fedprune.core.errors import IdentityError
from fedprune.security.certificates import subject_host

pytestmark = pytest.mark.board


@pytest.mark.parametrize("host", ["", "-x", "*.example", "x" * 64])
def test_hosts_that_are_none_are_refused(host: str) -> None:
    with pytest.raises(IdentityError, match="host of a broker"):
        subject_host(host)


@pytest.mark.parametrize("host", ["192.0.2.7", "::1", "[::1]"])
def test_an_address_is_one_in_brackets_too(host: str) -> None:
    assert subject_host(host) == x509.IPAddress(ipaddress.ip_address(host.strip("[]")))


@pytest.mark.parametrize("host", ["broker", "broker.example", "broker.example."])
def test_a_name_has_no_dot_at_its_end(host: str) -> None:
    assert subject_host(host) == x509.DNSName(host.rstrip("."))
