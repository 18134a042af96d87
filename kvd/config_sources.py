"""Where settings come from: a TOML file, over it the environment, over it flags.

Each source gives `{path: Setting}`; a path is the keys from the top, such as
`("pool", 0, "layout", "head_dim")`. Later sources replace single values of earlier ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvd.config_error import ConfigError, nearest
from kvd_shared.socket_dir import SOCKET_DIR_VARIABLE

Key = str | int
KeyPath = tuple[Key, ...]
Settings = dict[KeyPath, "Setting"]

SECTIONS = ("daemon", "access", "pool")
ENV_PREFIX = "KVD_"
FLAGS: dict[str, KeyPath] = {
    "--socket-dir": ("daemon", "socket_dir"),
    "--log-level": ("daemon", "log_level"),
    "--log-format": ("daemon", "log_format"),
    "--max-sessions": ("daemon", "max_sessions"),
    "--model": ("pool", 0, "model"),
    "--layout": ("pool", 0, "layout"),
    "--pool-name": ("pool", 0, "name"),
    "--pool-size": ("pool", 0, "size"),
    "--page-size": ("pool", 0, "page_size"),
    "--kv-dtype": ("pool", 0, "kv_dtype"),
    "--policy": ("pool", 0, "policy"),
    "--operator-quota": ("pool", 0, "operator_quota"),
    "--ttl-s": ("pool", 0, "ttl_s"),
    "--limits": ("pool", 0, "limits"),
    "--events": ("pool", 0, "events"),
}  # none for tenants: every user of the host can read a command line, and so the salts in it
TABLE_FLAGS = {
    "--layout": "num_layers=2,num_kv_heads=2,head_dim=32",
    "--limits": "max_prompt_tokens=32768,max_pages_a_session=4096",
    "--events": "endpoint=tcp://127.0.0.1:5557,buffer_steps=10000",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One value and where it was set."""

    value: Any
    label: str  # the key as its source spells it
    origin: str  # "environment", "command line" or the file
    is_text: bool = False  # numbers come as text, too

    def refuse(self, why: str) -> ConfigError:
        return ConfigError(f"{self.origin}: {self.label} = {self.value!r}: {why}")


def from_file(path: Path) -> Settings:
    """All values of a TOML file. Raises ConfigError when it cannot be read."""
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML: {e}") from e
    for name, value in tree.items():
        if name not in SECTIONS:
            raise ConfigError(f"{path}: {name}: no such section; {nearest(name, SECTIONS)}")
        wanted, written = (list, "[[pool]]") if name == "pool" else (dict, f"[{name}]")
        if not isinstance(value, wanted):
            raise ConfigError(f"{path}: {name}: must be written as {written}")
    return {
        key: Setting(leaf, show_path(key), str(path))
        for name, value in tree.items()
        for key, leaf in _leaves(value, (name,))
    }


def from_environment(env: Mapping[str, str]) -> Settings:
    """`KVD_DAEMON__LOG_LEVEL`, `KVD_POOL__0__LAYOUT__HEAD_DIM` and so on.

    `KVD_SOCKET_DIR`, which clients read, is the daemon's socket_dir too. Other variables without
    a double underscore are config_check's to judge.
    """
    settings: Settings = {}
    if env.get(SOCKET_DIR_VARIABLE):
        value = env[SOCKET_DIR_VARIABLE]
        settings["daemon", "socket_dir"] = Setting(value, SOCKET_DIR_VARIABLE, "environment", True)
    for variable, value in sorted(env.items()):
        if not variable.startswith(ENV_PREFIX) or "__" not in variable:
            continue
        section, *rest = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if section not in SECTIONS:
            raise ConfigError(
                f"environment: {variable}: no such section; {nearest(section, SECTIONS)}"
            )
        path = (section, *(int(key) if key.isdecimal() else key for key in rest))
        settings[path] = Setting(value, variable, "environment", True)
    return settings


def from_flags(flags: Mapping[str, str]) -> Settings:
    """Values given on the command line, by flag (`--page-size`); pool flags are for pool 0.

    A flag of a whole table is like `--layout num_layers=2,num_kv_heads=2,head_dim=32`.
    """
    settings: Settings = {}
    for flag, value in flags.items():
        setting = Setting(value, flag, "command line", True)
        if flag not in TABLE_FLAGS:
            settings[FLAGS[flag]] = setting
            continue
        for part in value.split(","):
            name, equals, inner = part.partition("=")
            if not equals:
                raise setting.refuse(f"must be like {TABLE_FLAGS[flag]}")
            settings[*FLAGS[flag], name.strip()] = Setting(
                inner.strip(), f"{flag} {name.strip()}", "command line", True
            )
    return settings


def show_path(path: KeyPath) -> str:
    """`pool[0].page_size`"""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    items: Iterable[tuple[Key, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and (path == ("pool",) or path[2:] == ("tenant",)):
        items = enumerate(value)
    for key, child in items:
        yield from _leaves(child, (*path, key))
    if not items:  # also an empty table, so that an empty [[pool]] is seen
        yield path, value
