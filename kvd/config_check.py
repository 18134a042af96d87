"""Checks over all settings at once: keys that nobody knows, pools that do not exist."""

from __future__ import annotations

from collections.abc import Mapping

from kvd.config_error import ConfigError, nearest
from kvd.config_fields import DAEMON_FIELDS, LAYOUT_FIELDS, POOL_FIELDS
from kvd.config_sources import FLAGS, KeyPath, Setting, Settings


def refuse_unknown(settings: Settings) -> None:
    """Raises ConfigError for the first key that is not in the tables of config_fields."""
    for path, setting in settings.items():
        match path:
            case ("daemon",) | ("pool", int()) if setting.value == {}:
                continue  # an empty table
            case ("daemon", *rest):
                known = set(DAEMON_FIELDS)
            case ("pool", int(), "layout"):
                raise setting.refuse(f"must be a table of {', '.join(LAYOUT_FIELDS)}")
            case ("pool", int(), "layout", *rest):
                known = set(LAYOUT_FIELDS)
            case ("pool", int(), *rest) if rest:
                known = {*POOL_FIELDS, "layout"}
            case ("pool",) if setting.value == []:
                continue
            case _:
                raise ConfigError(
                    f"{setting.origin}: {setting.label}: pools are numbered tables, "
                    "as [[pool]] or KVD_POOL__0__SIZE"
                )
        key = ".".join(str(part) for part in rest)
        if key not in known:
            raise ConfigError(
                f"{setting.origin}: {setting.label}: no such key; {nearest(key, known)}"
            )


def num_pools(settings: Settings) -> int:
    """How many pools are configured. Raises ConfigError when their numbers have a gap."""
    numbers = {
        path[1]: setting
        for path, setting in settings.items()
        if path[0] == "pool" and len(path) > 1
    }
    for number, setting in numbers.items():
        if isinstance(number, int) and number > 0 and number - 1 not in numbers:
            raise ConfigError(
                f"{setting.origin}: {setting.label}: there is no pool {number - 1} before it"
            )
    return len(numbers)


def refuse_pool_flags_for_many(settings: Settings, flags: Mapping[str, str]) -> None:
    """A pool's flag names no pool, so it is refused where there are several."""
    count = num_pools(settings)
    for flag in flags:
        section, *rest = FLAGS[flag]
        if count > 1 and section == "pool":
            raise ConfigError(
                f"command line: {flag} is for a single pool, but {count} are configured; "
                f"use KVD_POOL__<number>__{str(rest[-1]).upper()}"
            )


def below(settings: Settings, prefix: KeyPath) -> dict[str, Setting]:
    """The settings directly below `prefix`, by their last key."""
    depth = len(prefix)
    return {
        str(path[depth]): setting
        for path, setting in settings.items()
        if len(path) == depth + 1 and path[:depth] == prefix
    }
