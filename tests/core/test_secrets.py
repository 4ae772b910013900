"""Secrets in text and values are hidden before kvcache shows them."""

from unittest.mock import Mock
from urllib.parse import quote

import pytest

from kvcache import secrets
from kvcache.lower.circuit_breaker import CircuitBreaker, TierHealth
from kvcache.stats import TierName

SECRET = "hunter2-correct-horse"


@pytest.mark.parametrize(
    "name",
    ["password", "pasword", "passwd", "pass", "pwd", "pw", "redis_pw", "redispw", "PW", "secret",
     "client_secret", "token", "auth", "auth_key", "key", "api_key", "apikey", "accessKey",
     "X-Amz-Signature", "sig", "credential", "passphrase", "p%61ssword",
             "access_tokens", "block_tokens_password", "token_per_token"],
)  # fmt: skip
def test_may_be_secret_of_a_secret_name_is_true(name: str) -> None:
    assert secrets.hide_in_url(f"s3://host/?a=1&{name}={SECRET}") == f"s3://host/?a=1&{name}=***"
    if "%" not in name:
        assert secrets.may_be_secret(name)


@pytest.mark.parametrize(
    "name", ["url", "path", "capacity", "host", "db", "key_nbytes", "power", "spin", "design",
             "password_env", "token_file", "writes", "threads",
             "block_tokens", "--bytes-per-token", "max_tokens"],
)  # fmt: skip
def test_may_be_secret_of_another_name_is_false(name: str) -> None:
    assert not secrets.may_be_secret(name)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/1", "redis://host:6379/1"),
        ("no url, me@home", "no url, me@home"),
        (f"redis://me:{SECRET}@host", "redis://***@host"),
        (f"redis://{SECRET}@host/@", "redis://***@"),
        (f"redis://me:a/b@c {SECRET}@host", "redis://***@host"),
        (f"redis://host?db=1&password={SECRET}&x", "redis://host?db=1&password=***"),
        (f"redis://host#token={SECRET}", "redis://host#token=***"),
        ("http://host/?" + "a=1&" * 5000, "http://host/?" + "a=1&" * 5000),
    ],
)
def test_hide_in_url_hides_user_and_secret_parameters(url: str, shown: str) -> None:
    assert secrets.hide_in_url(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach redis://me:{SECRET}@host, nor http://h/?pw={SECRET}.",
        f'login refused: password="{SECRET}"',
        f"Authorization: Bearer {SECRET}",
        f"{{'db_pw': '{SECRET}', 'host': 'h'}}",
        f"TOKEN={SECRET}, and more",
        f"unrecognized arguments: --pw {SECRET} --other",
    ],
)
def test_redact_hides_values_with_secret_names(text: str) -> None:
    shown = secrets.redact(text)
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize("secret", [SECRET, "a b/c", "quo'te\n"])
def test_redact_hides_known_secrets_in_every_quoting(secret: str) -> None:
    text = f"ERR {secret!s} and {secret!r} and {quote(secret, safe='')} are wrong"
    shown = secrets.redact(text, secret, "")
    assert shown.startswith("ERR *** and ")
    assert secret not in shown
    assert quote(secret, safe="") not in shown
    assert repr(secret)[1:-1] not in shown


@pytest.mark.parametrize(
    ("text", "secret", "shown"),
    [
        ("ERR 0123456789.", "0123456789", "ERR ***."),
        ("ERR 012345678.", "0123456789", "ERR ***."),
        ("ERR 01234567", "0123456789", "ERR ***"),
        ("ERR 0123456.", "0123456789", "ERR 0123456."),
        ("ERR abc abcabc", "abc", "ERR *** ******"),
        ("ERR ab.", "abc", "ERR ab."),
    ],
)
def test_redact_hides_a_known_secret_that_is_cut_off(text: str, secret: str, shown: str) -> None:
    assert secrets.redact(text, secret) == shown


def test_redact_returns_one_printable_line_of_limited_length() -> None:
    shown = secrets.redact("ERR \x1b[31mred\r\nkvcache: forged\u2028" + "x" * 10_000)
    assert shown.startswith("ERR \\x1b[31mred\\r\\nkvcache: forged\\u2028x")
    assert shown.isprintable()
    assert len(shown) == secrets.MAX_CHARS


@pytest.mark.parametrize("text", ["a" * 300_000, "a=" * 150_000, "a://" * 75_000, "-" * 300_000])
def test_redact_of_a_long_text_takes_linear_time(text: str) -> None:
    assert len(secrets.redact(text)) == secrets.MAX_CHARS  # in quadratic time it would take minutes


def test_redact_keeps_sentences_about_secrets() -> None:
    for text in (
        "WRONGPASS invalid username-password pair or user is disabled.",
        "AuthenticationError: invalid password",
        "no such file: /etc/ssl/key.pem",
        "capacity = 50%",
    ):
        assert secrets.redact(text) == text


def test_hide_nested_hides_in_tables_and_lists() -> None:
    given = {"a": [{"pw": SECRET, "url": f"x://{SECRET}@h"}], "use_auth": True}
    assert secrets.hide_nested(given) == {
        "a": [{"pw": "***", "url": "x://***@h"}],
        "use_auth": True,
    }


def test_circuit_breaker_hides_secrets_in_logs_and_spans(
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[object] = []
    span = Mock(is_recording=lambda: True, add_event=lambda *event: events.append(event))
    health = TierHealth(TierName("redis", "redis"), {}, CircuitBreaker(lambda: 0.0))
    for _ in range(3):
        health.record_failure("load", "TierError", f"ERR redis://me:{SECRET}@host\x1b[31m", span)
    assert "redis://***@host\\x1b[31m" in caplog.text
    assert SECRET not in caplog.text
    assert "***" in str(events)
    assert SECRET not in str(events)
