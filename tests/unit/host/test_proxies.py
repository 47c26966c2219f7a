"""Which proxy a request goes by: the rules of Go's programs."""

import pytest

from nixlet.host import proxies

PROXY = "http://proxy.example.com:3128"


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "https://registry.example.com/v2", False),
        ("", "http://localhost:5000/v2", True),
        ("", "http://127.8.0.1:5000/v2", True),
        ("", "http://[::1]:5000/v2", True),
        ("*", "https://registry.example.com", True),
        ("10.0.0.0/8,192.0.2.0/24", "https://10.200.3.4:5000/v2", True),
        ("10.0.0.0/8", "https://11.0.0.1/v2", False),
        ("10.0.0.0/8", "https://[::ffff:10.0.0.1]/v2", True),
        ("2001:db8::/32", "https://[2001:db8::7]:5000/v2", True),
        ("192.0.2.7", "https://192.0.2.7:5000/v2", True),
        ("192.0.2.7:5000", "https://192.0.2.7:5000/v2", True),
        ("192.0.2.7:5001", "https://192.0.2.7:5000/v2", False),
        ("[2001:db8::7]:5000", "https://[2001:db8::7]:5000/v2", True),
        ("example.com", "https://example.com/v2", True),
        ("example.com", "https://a.Registry.example.com/v2", True),
        ("example.com", "https://badexample.com/v2", False),
        (".example.com", "https://example.com/v2", False),
        ("*.example.com", "https://example.com/v2", False),
        (" *.EXAMPLE.com , x", "https://a.example.com/v2", True),
        ("example.com:443", "https://example.com/v2", True),
        ("example.com:80", "https://example.com/v2", False),
        (":443,,", "https://example.com/v2", False),
    ],
)
def test_what_is_asked_directly(no_proxy: str, url: str, direct: bool) -> None:
    said = proxies.from_environment({"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy})
    assert said.for_url(url) == (None if direct else PROXY)


def test_each_scheme_has_its_own_and_capitals_win() -> None:
    said = proxies.from_environment({"http_proxy": "a:1", "HTTP_PROXY": "b:2", "https_proxy": "https://c"})
    assert said.for_url("http://registry.example.com") == "http://b:2"
    assert said.for_url("https://registry.example.com") == "https://c"
    assert proxies.from_environment({"HTTPS_PROXY": ""}).for_url("https://registry.example.com") is None
