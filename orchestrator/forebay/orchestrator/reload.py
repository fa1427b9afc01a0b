"""Reads the configuration again and applies what can change while calls are served.

What is in the file is checked as at the start, as a whole. If anything is
wrong nothing changes, and the reasons are the same sentences as at the start.
If all is well, the change is made between two steps of the event loop: calls
that are in progress end on what they began with, and calls that come find the
new settings.

Three things set it off: SIGHUP, a file that is another than before, and an
operator's call. A file counts as changed when it has been the same for one
interval, since editors and copies write in pieces; whoever writes a file aside
and renames it is never read half way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias, cast

from forebay.kit.config import ConfigError, ServerSettings, Settings, format_duration
from forebay.kit.failure import CapabilityUnsupported, InvalidRequest
from forebay.kit.process import Configuration
from forebay.orchestrator.config import BackendSettings, CacheSettings, OrchestratorSettings

logger = logging.getLogger(__name__)

SECTION = "orchestrator"

_FIXED = frozenset(ServerSettings.model_fields) | {
    *("web_address", "web_hosts", "trace_url"),
    *("performance", "slow_start", "affinity"),
}
"""Keys of the orchestrator that were used when it bound its ports, and what its memory was made with."""

_FIXED_CACHE = frozenset(CacheSettings.model_fields) - {"shared"}
"""Keys of the cache that its store was made with."""

_UNSHOWN = ("token", "digests")
"""Words in the names of keys whose values are not put into logs."""

_STDIN = 0

Signature: TypeAlias = tuple[str, int, int, int]
"""What tells one state of a file from another: its name, when it was written, its size, its inode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of the configuration."""

    changes: tuple[str, ...] = ()
    """What takes effect, a line each."""
    restart_required: tuple[str, ...] = ()
    """What differs and takes effect only after a restart, a line each."""


class Reload:
    """Applies the configuration file whenever it is told to.

    Args:
        configuration: what the process was started with. None is a process without one, such as a test's.
        settings: returns the settings in effect.
        apply: puts other settings into effect, all or, if it raises OSError, none. Returns what it changed
            that cannot be seen in the settings, a line each.
    """

    def __init__(
        self,
        configuration: Configuration | None,
        *,
        settings: Callable[[], OrchestratorSettings],
        apply: Callable[[OrchestratorSettings], list[str]],
    ) -> None:
        self._configuration = configuration
        self._settings = settings
        self._apply = apply

    def reload(self, *, validate_only: bool = False) -> Report:
        """Reads the file, and applies it unless it is only to be checked.

        Raises:
            ConfigError: something is wrong in it; nothing was changed.
            CapabilityUnsupported: this process has no configuration to read.
        """
        if self._configuration is None:
            raise CapabilityUnsupported("this orchestrator was not started from a configuration")
        sections = self._configuration.read()
        old, found = self._settings(), cast("OrchestratorSettings", sections[SECTION])
        new = _with_fixed_of(old, found)
        changes = differences(old, new)
        restart = differences(new, found)
        for name, settings in self._configuration.first.items():
            if name != SECTION:  # the rest of the process made itself by these, once
                restart += _compare(settings, sections[name], f"{name}.")
        if not validate_only:
            try:
                changes += self._apply(new)
            except OSError as error:
                where = self._configuration.path or "configuration"
                raise ConfigError([f"{where}: {SECTION}.backends: {error}"]) from error
        return Report(changes=tuple(changes), restart_required=tuple(restart))

    def serve(self, *, validate_only: bool) -> Report:
        """Does the same for an operator's call.

        Raises:
            InvalidRequest: something is wrong in it; nothing was changed.
        """
        try:
            report = self.reload(validate_only=validate_only)
        except ConfigError as error:
            if not validate_only:
                self._refuse(error)
            text = "\n".join(error.lines)
            raise InvalidRequest(
                f"the configuration is wrong, and nothing was changed:\n{text}",
                violations=[("configuration", line) for line in error.lines],
            ) from error
        if not validate_only:
            self._tell(report)
        return report

    def attempt(self, why: str) -> None:
        """Reloads where nobody waits for the outcome but the log.

        Args:
            why: what set it off, for the log.
        """
        logger.info("the configuration is read again: %s", why)
        try:
            self._tell(self.reload())
        except ConfigError as error:
            self._refuse(error)
        except Exception:
            logger.exception("the configuration could not be applied because of a fault of our own")

    async def run(self) -> None:
        """Reloads on SIGHUP and when the file changes, until it is cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._take_signal, os.isatty(_STDIN))
        try:
            await self._watch()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _take_signal(self, had_terminal: bool) -> None:
        # The same signal tells that the terminal was closed. Then it is meant as it is for any command.
        if had_terminal and not os.isatty(_STDIN):
            signal.raise_signal(signal.SIGTERM)
        else:
            self.attempt("SIGHUP")

    async def _watch(self) -> None:
        known = self._signature()
        while True:
            await self._pause()
            found = self._signature()
            if found == known:
                continue
            while True:  # until it is the same twice
                await self._pause()
                again = self._signature()
                if again == found:
                    break
                found = again
            known = found
            if not self._settings().reload.watch:
                continue
            if found is None:
                logger.warning("the configuration file is gone; the settings stay as they are")
            else:
                self.attempt(f"{found[0]} changed")

    async def _pause(self) -> None:
        await asyncio.sleep(self._settings().reload.interval.total_seconds())

    def _signature(self) -> Signature | None:
        path = self._configuration.path if self._configuration is not None else None
        try:
            found = path.stat() if path is not None else None
        except OSError:
            return None
        return None if found is None else (str(path), found.st_mtime_ns, found.st_size, found.st_ino)

    def _tell(self, report: Report) -> None:
        for line in report.changes:
            logger.info("configuration: %s", line)
        for line in report.restart_required:
            logger.warning("configuration: %s, after a restart", line)
        if not report.changes and not report.restart_required:
            logger.info("configuration: nothing changed")

    def _refuse(self, error: ConfigError) -> None:
        for line in error.lines:
            logger.error("configuration: %s", line)
        logger.error("configuration: it is wrong, and nothing was changed")


def differences(old: OrchestratorSettings, new: OrchestratorSettings) -> list[str]:
    """Returns in what settings differ, a line each."""
    lines: list[str] = []
    before = {backend.name: backend for backend in old.backends}
    after = {backend.name: backend for backend in new.backends}
    lines += [f'backend "{name}": removed' for name in before if name not in after]
    for name, backend in after.items():
        was = before.get(name)
        if was is None:
            lines.append(f'backend "{name}": added at {backend.address}')
        else:
            lines += _compare(was, backend, f'backend "{name}": ')
    kept = [name for name in before if name in after]
    if kept != [name for name in after if name in before]:
        lines.append(f"{SECTION}.backends: order {', '.join(before)} -> {', '.join(after)}")
    for alias in dict.fromkeys((*old.aliases, *new.aliases)):
        was_meant, meant = old.aliases.get(alias), new.aliases.get(alias)
        if was_meant != meant:
            lines.append(f'alias "{alias}": {_shown(was_meant)} -> {_shown(meant)}')
    lines += _compare(old, new, f"{SECTION}.", without={"backends", "aliases"})
    return lines


def replaces(old: BackendSettings, new: BackendSettings) -> bool:
    """Returns whether a backend has to be reached anew, since where it is or who we are there changed."""
    places = ("address", "tls_roots", "token_file")
    return any(getattr(old, place) != getattr(new, place) for place in places)


def _compare(
    old: Settings, new: Settings, prefix: str, without: set[str] | frozenset[str] = frozenset()
) -> Iterator[str]:
    for name in type(new).model_fields:
        was, now = getattr(old, name), getattr(new, name)
        if name in without or was == now:
            continue
        if isinstance(was, Settings) and isinstance(now, Settings):
            yield from _compare(was, now, f"{prefix}{name}.")
        elif any(word in name for word in _UNSHOWN):
            yield f"{prefix}{name} changed"
        else:
            yield f"{prefix}{name} {_shown(was)} -> {_shown(now)}"


def _shown(value: object) -> str:
    match value:
        case None:
            return "unset"
        case timedelta():
            return format_duration(value)
        case bool():
            return str(value).lower()
        case str() | Path():
            return f'"{value}"'
        case dict():
            return ", ".join(f"{model} on {backend}" for backend, model in value.items()) or "nothing"
        case _:
            return str(value)


def _with_fixed_of(old: OrchestratorSettings, new: OrchestratorSettings) -> OrchestratorSettings:
    """Returns the new settings with what only a restart can change as it was."""
    fixed = {name: getattr(old, name) for name in _FIXED}
    cache = {name: getattr(old.cache, name) for name in _FIXED_CACHE}
    return new.model_copy(update={**fixed, "cache": new.cache.model_copy(update=cache)})
