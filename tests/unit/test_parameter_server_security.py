"""Where tokens and certificates come from, and the one line for each that cannot be read."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from embershard.parameter_server.security import (
    Certificates,
    Security,
    given_token,
    is_loopback,
    run_token,
    token_source,
)
from embershard.parameter_server.store import SecurityError

GIVEN = "a-token-that-was-given"


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "EMBERSHARD_TOKEN",
        "EMBERSHARD_TOKEN_FILE",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USE_TLS",
        "RAY_TLS_SERVER_CERT",
        "RAY_TLS_SERVER_KEY",
        "RAY_TLS_CA_CERT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_given_token_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file-0123456789\n")
    monkeypatch.setenv("EMBERSHARD_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "rays")
    assert run_token("run").get_secret_value() == "from-a-file-0123456789"
    monkeypatch.setenv("EMBERSHARD_TOKEN", GIVEN)
    assert run_token("run").get_secret_value() == GIVEN
    assert token_source() == "given by EMBERSHARD_TOKEN"
    assert Security.of_process().token.get_secret_value() == GIVEN
    assert Security.of_process("given-by-argument-1").token.get_secret_value() == "given-by-argument-1"


def test_else_it_is_derived_from_rays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def derived(token: str, namespace: str) -> str:
        return hmac.new(token.encode(), b"embershard data plane\0" + namespace.encode(), hashlib.sha256).hexdigest()

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home")
    assert run_token("a").get_secret_value() == derived("home", "a")
    (tmp_path / "other").write_text("path\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert run_token("a").get_secret_value() == derived("path", "a")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert run_token("b").get_secret_value() == derived("variable", "b")
    assert token_source() == "each run has its own, derived from Ray's"
    assert given_token() is None  # a tool outside is not handed it silently: another run's would be wrong


def test_else_it_is_random_and_new_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not asked for without RAY_AUTH_MODE=token")
    tokens = {run_token("a").get_secret_value() for _ in range(3)}
    assert token_source() == "each run has its own"
    assert len(tokens) == 3 and {len(token) for token in tokens} == {64}


@pytest.mark.parametrize("token", ["short", "with spaces in between", "ünprintable-in-metadata", "a\nb" * 8])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBERSHARD_TOKEN", token)
    with pytest.raises(SecurityError, match="EMBERSHARD_TOKEN: a token is at least 16 printable ASCII") as error:
        given_token()
    assert token not in str(error.value)


def test_files_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setenv("EMBERSHARD_TOKEN_FILE", nowhere)
    with pytest.raises(SecurityError, match=f"^EMBERSHARD_TOKEN_FILE: {nowhere} cannot be read: No such file"):
        given_token()
    assert Certificates.of_environment() is None
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(SecurityError, match=r"^RAY_TLS_SERVER_CERT is not set, and RAY_USE_TLS asks for it"):
        Certificates.of_environment()
    for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    (tmp_path / "file").write_text("no certificate")
    monkeypatch.setenv("RAY_TLS_CA_CERT", nowhere)
    with pytest.raises(SecurityError, match=f"^RAY_TLS_CA_CERT: {nowhere} cannot be read: No such file"):
        Certificates.of_environment()
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "file"))
    with pytest.raises(SecurityError, match=r"^RAY_TLS_CA_CERT: .*/file holds no PEM certificate"):
        Certificates.of_environment()


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.0.9", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]))
