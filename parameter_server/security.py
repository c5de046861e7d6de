"""What guards a shard's port: mutual TLS with the certificates that Ray uses, and a token in every call.

Both come from the environment of each process, so that a certificate's key never leaves its node; the token may also be
given. docs/security.md says what each protects against and what it does not.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from pydantic import SecretStr

from .store import SecurityError

TOKEN, TOKEN_FILE = "EMBERSHARD_TOKEN", "EMBERSHARD_TOKEN_FILE"
MIN_TOKEN_LENGTH = 16
DIAGNOSIS_SECONDS = 2.0
_CERTIFICATES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_HEADER = "authorization"
_NOT_ACCEPTED = (
    "it does not accept this process's certificate: RAY_TLS_SERVER_CERT here must be in date, and signed by what "
    "RAY_TLS_CA_CERT names there"
)
_LABEL = b"embershard data plane\0"


@dataclass(frozen=True)
class Certificates:
    """The PEM files of this process: its certificate and key, and the authority that signs everybody's."""

    certificate: str
    key: str
    authority: str

    @classmethod
    def of_environment(cls) -> Certificates | None:
        """What RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT name; None unless RAY_USE_TLS is 1 or true.

        Raises:
            SecurityError: a variable is not set, or its file cannot be read.
        """
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            return None
        paths = []
        for variable in _CERTIFICATES:
            path = os.environ.get(variable)
            if not path:
                raise SecurityError(f"{variable} is not set, and RAY_USE_TLS asks for it: the path of a PEM file")
            _read(variable, path)
            paths.append(path)
        found = cls(*paths)
        found.context()
        return found

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key and authority as they are now: a file that was renewed serves the next connection."""
        return (
            _read(_CERTIFICATES[0], self.certificate),
            _read(_CERTIFICATES[1], self.key),
            _read(_CERTIFICATES[2], self.authority),
        )

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, which says what it finds wrong. Raises SecurityError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.authority)
        except ssl.SSLError:
            raise SecurityError(f"{_CERTIFICATES[2]}: {self.authority} holds no PEM certificate") from None
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise SecurityError(
                f"{_CERTIFICATES[0]} and {_CERTIFICATES[1]}: {self.certificate} and {self.key} are not a PEM "
                f"certificate and its unencrypted key: {error.reason}"
            ) from None
        return context


@dataclass(frozen=True)
class Security:
    """What one process shows to its peers and asks of them. Its `repr` shows no secret."""

    token: SecretStr | None = None
    certificates: Certificates | None = None

    @classmethod
    def of_process(cls, token: str | SecretStr | None = None) -> Security:
        """Certificates of the environment; `token`, or that of EMBERSHARD_TOKEN or EMBERSHARD_TOKEN_FILE.

        Raises:
            SecurityError: a file is missing or unreadable, or the token is too short or holds spaces.
        """
        secret = given_token() if token is None else _checked("token", _plain(token))
        return cls(secret, Certificates.of_environment())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a client adds to every call."""
        return () if self.token is None else ((_HEADER, f"Bearer {self.token.get_secret_value()}"),)

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A connection to `address`, whose certificate must name the host that `address` names."""
        if self.certificates is None:
            return grpc.insecure_channel(address, options=options)
        certificate, key, authority = self.certificates.read()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.secure_channel(address, credentials, options=options)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Opens `address`, over TLS only where there are certificates; clients must then show one, too."""
        if self.certificates is None:
            return int(server.add_insecure_port(address))
        certificate, key, authority = self.certificates.read()
        credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
        return int(server.add_secure_port(address, credentials))

    def interceptors(self, owner: str) -> list[grpc.aio.ServerInterceptor]:
        return [] if self.token is None else [_TokenCheck(owner, self.metadata[0][1])]

    def require_token_beyond_loopback(self, owner: str, host: str) -> None:
        """Raises SecurityError where others than this machine could connect and nothing would ask them for a token."""
        if self.token is None and not is_loopback(host):
            raise SecurityError(
                f"{owner}: {host} is not loopback, and there is no token: set {TOKEN} or {TOKEN_FILE} for shards and "
                f"clients alike"
            )

    def diagnose(self, address: str, error: grpc.RpcError) -> str | None:
        """Why a call to `address` failed, if no later call can succeed; None if waiting may help.

        gRPC tells a plain connection to a TLS port, and one whose certificate was refused, no more than "Socket
        closed": so handshakes are made here, within seconds, to see who speaks what.
        """
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return str(error.details())
        if error.code() != grpc.StatusCode.UNAVAILABLE:
            return None
        host, _, port = address.rpartition(":")
        try:
            first = self._shake_hands(host.strip("[]"), int(port))
            # Twice, because a shard that is just ending may look the same once.
            return first if first is not None and first == self._shake_hands(host.strip("[]"), int(port)) else None
        except (OSError, SecurityError):  # nobody listens or answers; or our own files are being renewed
            return None

    def _shake_hands(self, host: str, port: int) -> str | None:
        ours = self.certificates
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if ours is None else ours.context()
        if ours is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, port), DIAGNOSIS_SECONDS) as raw:
            try:
                with context.wrap_socket(raw, server_hostname=host) as secure:
                    if ours is None:
                        return "it speaks TLS and this process does not: set RAY_USE_TLS=1 and its certificates here"
                    # With TLS 1.3 the server looks at our certificate after the handshake; then it speaks or hangs up.
                    return None if secure.recv(1) else _NOT_ACCEPTED
            except ssl.SSLCertVerificationError as refused:
                return (
                    f"its certificate is not accepted here: {refused.verify_message}; RAY_TLS_CA_CERT must have signed "
                    f"it, for {host}"
                )
            except ssl.SSLError as refused:
                if "ALERT" in (refused.reason or ""):
                    return _NOT_ACCEPTED
                if ours is not None and refused.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
                    return "it does not speak TLS, and RAY_USE_TLS is set here: set it for the shards, too"
                return None


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types here
    """Refuses a call by its metadata, before a byte of its message is read: that of any method, known or not."""

    def __init__(self, owner: str, expected: str) -> None:
        self._expected = _digest(expected)
        self._missing = _refusal(f"{owner}: a token is required; set {TOKEN} or {TOKEN_FILE}, or give token=")
        self._wrong = _refusal(f"{owner}: the token is not the one that this shard was started with")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        shown = dict(handler_call_details.invocation_metadata).get(_HEADER)
        if shown is None:
            return self._missing
        # Digests, so that neither the comparison's time nor its length says anything about the token.
        if not hmac.compare_digest(_digest(shown), self._expected):
            return self._wrong
        return await continuation(handler_call_details)


def _refusal(message: str) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    # As a stream whatever the method is: only then does gRPC not wait for the message first.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _digest(shown: str | bytes) -> bytes:
    return hashlib.sha256(shown.encode() if isinstance(shown, str) else shown).digest()


def run_token(namespace: str) -> SecretStr:
    """The token of one start of a run: the given one, or one derived from Ray's own, or else a random one.

    Derived: HMAC-SHA256 of a fixed label and `namespace` under Ray's token, so that neither tells the other.

    Raises:
        SecurityError: a file is missing or unreadable, or the given token is too short or holds spaces.
    """
    if (given := given_token()) is not None:
        return given
    if (rays := _ray_token()) is not None:
        return SecretStr(hmac.new(rays.encode(), _LABEL + namespace.encode(), hashlib.sha256).hexdigest())
    return SecretStr(secrets.token_hex(32))


def token_source() -> str:
    """Where `run_token` takes a run's token from, in words. Raises SecurityError."""
    if given_token() is not None:
        return f"given by {TOKEN if os.environ.get(TOKEN) else TOKEN_FILE}"
    return "each run has its own, derived from Ray's" if _ray_token() is not None else "each run has its own"


def given_token() -> SecretStr | None:
    """EMBERSHARD_TOKEN, or the content of EMBERSHARD_TOKEN_FILE, or None. Raises SecurityError."""
    if token := os.environ.get(TOKEN):
        return _checked(TOKEN, token)
    if path := os.environ.get(TOKEN_FILE):
        return _checked(f"{TOKEN_FILE} {path}", _read(TOKEN_FILE, path).decode(errors="replace").strip())
    return None


def _ray_token() -> str | None:
    """Ray's own token, where Ray asks for one, from where Ray takes it, in Ray's order."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path("~/.ray/auth_token").expanduser())
    return _read("RAY_AUTH_TOKEN_PATH", path).decode(errors="replace").strip() or None


def _checked(source: str, token: str) -> SecretStr:
    # gRPC would refuse other characters in metadata, with an error that shows them.
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise SecurityError(
            f"{source}: a token is at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, "
            f"for example the output of: openssl rand -hex 32"
        )
    return SecretStr(token)


def _plain(token: str | SecretStr) -> str:
    return token.get_secret_value() if isinstance(token, SecretStr) else token


def _read(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SecurityError(f"{variable}: {path} cannot be read: {error.strerror}") from None


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine can connect to."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
