"""Settings: frozen models read from one TOML file and the environment, and checked before anything starts.

Every process reads the same `forebay.toml` and takes its own sections. A value
from the environment, such as `FOREBAY_MLX__MAX_ROWS=4`, goes before the file.
All mistakes are reported at once, each in one line that names the key and the
remedy, because a person who fixes a file wants to fix it once.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self, cast

import platformdirs
import pydantic
import pydantic_settings
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

SECTIONS = ("orchestrator", "mlx", "ollama", "lmstudio", "openai", "telemetry", "log", "up")
"""Every section that a `forebay.toml` can have."""

FILE_NAME = "forebay.toml"

_ENV_PREFIX = "FOREBAY_"
_NESTED = "__"

_DURATION = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)")
_DURATIONS = re.compile(r"(?:\s*\d+(?:\.\d+)?\s*(?:ms|s|m|h|d))+\s*")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>B|KiB|MiB|GiB|TiB|kB|KB|MB|GB|TB)?")
_BYTES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_duration(value: object) -> timedelta:
    """Reads `"250ms"`, `"1.5s"`, `"2m"`, `"1h 30m"` or a number of seconds.

    Raises:
        ValueError: it is none of these, or negative.
    """
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        duration = timedelta(seconds=value)
    elif isinstance(value, str) and _DURATIONS.fullmatch(value):
        duration = timedelta(
            seconds=sum(float(m["value"]) * _SECONDS[m["unit"]] for m in _DURATION.finditer(value))
        )
    elif isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):  # the environment has only strings
        duration = timedelta(seconds=float(value))
    else:
        raise ValueError('write a duration such as "250ms", "1.5s", "2m" or "1h"')
    if duration < timedelta(0):
        raise ValueError("a duration cannot be negative")
    return duration


def format_duration(duration: timedelta) -> str:
    """Writes a duration the way `parse_duration` reads it."""
    seconds = duration.total_seconds()
    for unit in ("d", "h", "m", "s"):
        size = _SECONDS[unit]
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    if seconds == 0:
        return "0s"
    milliseconds = seconds * 1000
    return f"{milliseconds:g}ms" if milliseconds < 1000 else f"{seconds:g}s"


def _parse_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(float(match["value"]) * _BYTES[match["unit"] or "B"])
    else:
        raise ValueError('write a size such as "512MiB", "4GiB" or a number of bytes')
    if size < 0:
        raise ValueError("a size cannot be negative")
    return size


def _check_address(value: str) -> str:
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        # The kernel's sockaddr_un holds 108 bytes on Linux and 104 on macOS, the final zero included.
        if not path or len(path.encode()) > 103:
            raise ValueError("a unix address is unix:/path of at most 103 bytes")
        return value
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError('write an address such as "127.0.0.1:50150", "[::1]:50150" or "unix:/path"')
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
]
"""A time span; in TOML `"250ms"`, `"1.5s"`, `"2m"`, `"1h"` or a number of seconds."""

ByteSize = Annotated[int, BeforeValidator(_parse_size)]
"""A number of bytes; in TOML `"512MiB"`, `"4GiB"` or a plain number."""

Address = Annotated[str, AfterValidator(_check_address)]
"""Where a service listens: `host:port`, `[v6]:port` or `unix:/path`."""


def is_local(address: str) -> bool:
    """Returns whether only this machine can reach the address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseModel):
    """Settings of one thing: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with values that are right by themselves, a sentence each."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = list(self.problems())
        if problems:  # all of them, where a validator for each would stop at the first
            raise ValueError("\n".join(problems))
        return self


class ServerSettings(Settings):
    """What every process that serves gRPC has."""

    address: Address = Field(
        default="127.0.0.1:0", description="Address to listen on. Port 0 picks a free one."
    )
    grace: Duration = Field(
        default=timedelta(seconds=30),
        description="How long calls in progress may go on after a request to stop.",
    )
    notice: Duration = Field(
        default=timedelta(milliseconds=200),
        description="Time between saying NOT_SERVING and refusing calls, so that callers go elsewhere first.",
    )
    reflection: bool = Field(
        default=True, description="Whether tools may ask which services and messages there are."
    )
    insecure_listen: bool = Field(
        default=False,
        description="Allows an address that other machines can reach without TLS and auth. Anyone who "
        "reaches the port can then use the models and read the answers.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with the server's certificate chain."
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the server's private key.")
    tls_client_roots: Path | None = Field(
        default=None,
        description="PEM file with the roots that clients' certificates must come from (mutual TLS).",
    )
    auth_token_digests: tuple[str, ...] = Field(
        (),
        description="SHA-256 digests, in hexadecimal, of the bearer tokens that callers may use. "
        "Empty asks for none.",
    )
    metrics_address: Address | None = Field(
        default=None,
        description="Address of a page for Prometheus, such as `127.0.0.1:50250`: /metrics over plain HTTP. "
        "Unset has none. By convention its port is that of `address` plus 100.",
    )
    metrics_hosts: tuple[str, ...] = Field(
        (),
        description="Names by which that page may be asked for, besides those of this machine. "
        "Any other `Host` is refused, so that no web page can read it through a browser.",
    )

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with values that are right by themselves, a sentence each."""
        yield from super().problems()
        if (self.tls_certificate is None) != (self.tls_key is None):
            yield "set tls_certificate and tls_key together"
        if self.tls_client_roots is not None and self.tls_certificate is None:
            yield "tls_client_roots needs tls_certificate and tls_key"
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in self.auth_token_digests):
            yield "auth_token_digests holds 64 hexadecimal digits each: printf %s TOKEN | sha256sum"
        if not is_local(self.address) and not self.is_guarded and not self.insecure_listen:
            yield (
                f"address {self.address} can be reached from other machines: set tls_certificate, tls_key "
                "and auth_token_digests (or tls_client_roots), or insecure_listen = true to serve "
                "without protection"
            )
        metrics = self.metrics_address
        if metrics is not None and metrics.startswith("unix:"):
            yield f"metrics_address {metrics}: Prometheus needs a port, not a socket"
        elif metrics is not None and not is_local(metrics) and not self.insecure_listen:
            yield (
                f"metrics_address {metrics} can be reached from other machines, and shows names of "
                "models and figures to whoever asks: set insecure_listen = true to allow that"
            )

    @property
    def is_guarded(self) -> bool:
        """Whether callers have to prove who they are, over TLS."""
        return self.tls_certificate is not None and bool(self.tls_client_roots or self.auth_token_digests)


class ConfigError(Exception):
    """The configuration is wrong.

    Args:
        lines: one readable sentence a mistake.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def find_file() -> Path | None:
    """Returns the configuration file that is used when none is named.

    That is `forebay.toml` in the working directory, else in the user's
    configuration folder, else None.
    """
    for folder in (Path.cwd(), Path(platformdirs.user_config_dir("forebay"))):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def load(sections: Mapping[str, type[Settings]], *, path: Path | None = None) -> dict[str, Settings]:
    """Reads the named sections and checks them all.

    Args:
        sections: the type of each section that is wanted, by name. Other known sections are left alone.
        path: the file; None looks where `find_file` looks, and finding none is no mistake.

    Raises:
        ConfigError: with every mistake in the wanted sections, and every unknown section.
    """
    if path is None:
        path = find_file()
    data, lines = _read(path)
    where = str(path) if path is not None else "configuration"
    for name in data:
        if name not in SECTIONS:
            lines.append(f"{where}: [{name}]: there is no such section{_closest(name, SECTIONS)}")
    fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in sections.items()}
    wanted = {name: value for name, value in data.items() if name in sections}
    try:
        settings = _settings_type(wanted, fields)()
    except pydantic.ValidationError as error:
        lines.extend(line for item in error.errors() for line in _lines(where, item, sections))
    except pydantic_settings.SettingsError as error:
        lines.append(f"environment: {error}")
    if lines:
        raise ConfigError(lines)
    return {name: cast("Settings", getattr(settings, name)) for name in sections}


def _read(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    if path is None:
        return {}, []
    try:
        with path.open("rb") as file:
            return tomllib.load(file), []
    except FileNotFoundError:
        return {}, [f"{path}: there is no such file"]
    except OSError as error:
        return {}, [f"{path}: it cannot be read: {error.strerror}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: it is not valid TOML: {error}"]


def _settings_type(data: dict[str, Any], fields: dict[str, Any]) -> type[pydantic_settings.BaseSettings]:
    class Root(pydantic_settings.BaseSettings):
        model_config = pydantic_settings.SettingsConfigDict(
            env_prefix=_ENV_PREFIX, env_nested_delimiter=_NESTED, extra="ignore", validate_default=True
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[pydantic_settings.BaseSettings],
            init_settings: pydantic_settings.PydanticBaseSettingsSource,
            env_settings: pydantic_settings.PydanticBaseSettingsSource,
            dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,
            file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,
        ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
            file = pydantic_settings.InitSettingsSource(settings_cls, init_kwargs=data)
            return env_settings, file

    return pydantic.create_model("Configuration", __base__=Root, **fields)


def _lines(
    where: str, item: Any, sections: Mapping[str, type[Settings]]
) -> list[str]:  # Any: pydantic's ErrorDetails
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    variable = _ENV_PREFIX + _NESTED.join(location).upper()
    source = f"environment variable {variable}" if variable in os.environ else f"{where}: {key}"
    if item["type"] == "extra_forbidden":
        known = _keys_beside(location, sections)
        return [f"{source}: there is no such key{_closest(location[-1], known)}"]
    messages = str(item["msg"]).removeprefix("Value error, ").split("\n")
    given = item.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return [f"{source}: {message[:1].lower()}{message[1:]}{shown}" for message in messages]


def _keys_beside(location: list[str], sections: Mapping[str, type[Settings]]) -> tuple[str, ...]:
    kind = sections.get(location[0])
    for part in location[1:-1]:
        field = kind.model_fields.get(part) if kind is not None else None
        inner = getattr(field, "annotation", None)
        kind = inner if isinstance(inner, type) and issubclass(inner, Settings) else None
    return tuple(kind.model_fields) if kind is not None else ()


def _closest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else ""
