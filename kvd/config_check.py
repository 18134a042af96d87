"""Checks over all settings at once: keys that nobody knows, pools that do not exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

from kvd.config_error import ConfigError, nearest
from kvd.config_keys import (
    ACCESS_FIELDS,
    CACHE_FIELDS,
    DAEMON_FIELDS,
    POOL_FIELDS,
    POOL_KEYS,
    POOL_TABLES,
    TENANT_FIELDS,
)
from kvd.config_sources import ENV_PREFIX, FLAGS, KeyPath, Setting, Settings
from kvd_shared.socket_dir import SOCKET_DIR_VARIABLE

# Kubernetes puts these into the containers of a namespace that has a service named kvd or kvd-…
_SERVICE_LINK = re.compile(
    r"KVD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)

# single values by their last key
_SETTABLE = (
    {key: f"KVD_DAEMON__{key.upper()}" for key in DAEMON_FIELDS}
    | {key: f"KVD_ACCESS__{key.upper()}" for key in ACCESS_FIELDS}
    | {key: f"KVD_POOL__0__{key.upper()}" for key in (*POOL_FIELDS, *CACHE_FIELDS)}
)


def refuse_unknown(settings: Settings) -> None:
    """Raises ConfigError for the first key that is not in the tables of config_keys."""
    for path, setting in settings.items():
        match path:
            case ("daemon",) | ("access",) if setting.value == {}:
                continue
            case ("pool", int()) | ("pool", int(), "limits") if setting.value == {}:
                continue  # an empty table
            case ("pool", int(), "tenant", int()) if setting.value == {}:
                continue  # refused with what it lacks
            case ("pool",) | ("pool", int(), "tenant") if setting.value == []:
                continue
            case ("daemon", *rest):
                known = set(DAEMON_FIELDS)
            case ("access", *rest):
                known = set(ACCESS_FIELDS)
            case ("pool", int(), str(table)) if table in POOL_TABLES:
                raise setting.refuse(f"must be a table of {', '.join(POOL_TABLES[table])}")
            case ("pool", int(), str(table), *rest) if table in POOL_TABLES:
                known = set(POOL_TABLES[table])
            case ("pool", int(), "tenant", int(), *rest) if rest:
                known = set(TENANT_FIELDS)
            case ("pool", int(), "tenant", *_):
                raise ConfigError(
                    f"{setting.origin}: {setting.label}: tenants are numbered tables, "
                    "as [[pool.tenant]] or KVD_POOL__0__TENANT__0__SALT"
                )
            case ("pool", int(), *rest) if rest:
                known = POOL_KEYS
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


# The second is kvd.metadata.failpoints.VARIABLE, by which tests end the daemon at a certain store.
_NO_SETTINGS = (SOCKET_DIR_VARIABLE, "KVD_FAILPOINT")


def refuse_unknown_variables(env: Mapping[str, str]) -> None:
    """Raises ConfigError for a `KVD_` variable that sets nothing, or the operator who wrote it
    would believe that it does. Those with a double underscore are `refuse_unknown`'s."""
    for variable in sorted(env):
        ours = variable.startswith(ENV_PREFIX) and "__" not in variable
        if not ours or variable in _NO_SETTINGS or _SERVICE_LINK.fullmatch(variable):
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        key = key.removeprefix("daemon_").removeprefix("access_").removeprefix("pool_")
        close = get_close_matches(key, _SETTABLE, n=1)
        if close:
            hint = f"did you mean {_SETTABLE[close[0]]}?"
        else:
            hint = f"known are {SOCKET_DIR_VARIABLE} and such as KVD_DAEMON__LOG_LEVEL"
        raise ConfigError(f"environment: {variable}: no such setting; {hint}")


def num_tables(settings: Settings, prefix: KeyPath) -> int:
    """How many numbered tables are below `prefix`, such as ("pool",). Raises ConfigError when
    their numbers have a gap."""
    depth = len(prefix)
    numbers = {
        path[depth]: setting
        for path, setting in settings.items()
        if len(path) > depth and path[:depth] == prefix
    }
    for number, setting in numbers.items():
        if isinstance(number, int) and number > 0 and number - 1 not in numbers:
            raise ConfigError(
                f"{setting.origin}: {setting.label}: there is no {prefix[-1]} {number - 1} "
                "before it"
            )
    return len(numbers)


def refuse_pool_flags_for_many(settings: Settings, flags: Mapping[str, str]) -> None:
    """A pool's flag names no pool, so it is refused where there are several."""
    count = num_tables(settings, ("pool",))
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
