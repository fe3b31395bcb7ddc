"""Options of the HTTP server, `kvik serve`, beside those of the engine. Validation only.

Command line flags, environment variables, config files and docs/serving.md are made from the fields below.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import sys

from kvik.config import parse_bytes
from kvik.errors import ConfigError
from kvik.fields import check_fields, option, strict

__all__ = ["ServerConfig"]

_DAY = 86400.0
_CORES_PER_HTTP, _MOST_HTTP = 8, 4
"""One core carries about as many streams as a fast GPU feeds, so a second process is for slow cores and for bursts."""


@strict(ConfigError, aliases={"api_keys": "api_key"}, hints={"workers": "use api_processes"})
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of `kvik serve`. Limits hold for the whole server; times are in seconds."""

    host: str = option("127.0.0.1", "address to listen on; one that others can reach needs API keys")
    port: int = option(8000, "TCP port; 0 takes a free one", low=0, high=65535)
    served_model_name: tuple[str, ...] = option((), "names that requests may use for the model; the first is shown")
    api_key: tuple[str, ...] = option((), "keys, one of which every request must bring as a bearer token")
    api_key_file: str | None = option(None, "file with API keys, one per line")
    allow_unauthenticated: bool = option(False, "let in everybody who can reach an address that is not loopback")
    cors_origins: tuple[str, ...] = option((), "origins whose web pages may call this server; * is all of them")
    ssl_certfile: str | None = option(None, "certificate chain (PEM) to serve HTTPS with")
    ssl_keyfile: str | None = option(None, "private key (PEM) of the certificate")
    ssl_keyfile_password: str | None = option(None, "password of the private key")
    api_processes: int | None = option(
        None, "HTTP processes; by default one for every 8 cores on Linux, 4 at most", low=1, high=64
    )
    strict: bool = option(False, "refuse unknown request fields instead of reporting them in `warnings`")
    max_body_bytes: int = option(
        8 * 2**20, "largest request body, such as 8MiB", low=1024, high=2**31, parse=parse_bytes
    )
    max_queued_requests: int = option(1024, "sequences that may wait for a first token; more get a 429", low=1)
    max_requests_per_key: int | None = option(None, "requests that one API key may have open; more get a 429", low=1)
    max_queued_tokens: int = option(2_000_000, "prompt tokens that may wait; more get a 429", low=1)
    max_n: int = option(64, "largest n, and most prompts in one request", low=1, high=1024)
    max_logit_bias: int = option(1024, "most logit_bias entries in one request", low=0)
    tool_format: str = option(
        "auto",
        "how the model writes tool calls; auto looks at its chat template, none leaves calls in the content",
        choices=("auto", "none", "hermes", "qwen3_coder", "glm45", "mistral", "mistral_args", "llama"),
    )
    reasoning_field: str = option(
        "reasoning_content",
        "member of messages for what a model thinks before it answers; none leaves that in the content",
        choices=("reasoning_content", "reasoning", "none"),
    )
    request_timeout: float | None = option(None, "time after which a request ends with an error", above=0, high=_DAY)
    stream_interval: float = option(
        0.0, "time between two events of a stream at least; tokens in between share one", low=0, high=10.0
    )
    slow_client_timeout: float = option(60.0, "time that a client may leave its stream unread", above=0, high=_DAY)
    drain_timeout: float = option(30.0, "time that open requests get to finish after SIGTERM", low=0, high=_DAY)
    stall_timeout: float = option(
        30.0, "time without a sign of the engine after which /ready says 503", above=0, high=_DAY
    )
    engine_timeout: float = option(
        300.0, "time without a sign of the engine after which the server gives up", above=0, high=_DAY
    )

    def __post_init__(self) -> None:
        check_fields(self, lambda message, name: ConfigError(message))
        if not all(self.served_model_name):
            raise ConfigError("served_model_name must not be empty")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile belong together; give both or none")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key is empty; leave it out to serve without keys")
        if self.max_requests_per_key and not (self.api_key or self.api_key_file):
            raise ConfigError("max_requests_per_key needs keys to count for: give --api-key or --api-key-file")
        if not (self.is_loopback or self.api_key or self.api_key_file or self.allow_unauthenticated):
            raise ConfigError(
                f"host {self.host} can be reached by others and there is no API key: give --api-key or --api-key-file,"
                " or --allow-unauthenticated to let everybody in"
            )

    @property
    def num_http(self) -> int:
        """How many HTTP processes there are, once `with_processes` has decided."""
        return self.api_processes or 1

    def with_processes(self, num_cores: int) -> ServerConfig:
        """The same with a number of HTTP processes that suits the machine, unless one is given."""
        share = sys.platform == "linux"  # where SO_REUSEPORT spreads connections
        suited = min(_MOST_HTTP, max(1, num_cores // _CORES_PER_HTTP)) if share else 1
        return dataclasses.replace(self, api_processes=self.api_processes or suited)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
