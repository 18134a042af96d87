"""What the values of configuration keys may be."""

from __future__ import annotations

import grp
import math
import os
import pwd
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvd.config_error import ConfigError
from kvd.config_sources import Setting
from kvd_shared.layout import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from kvd_shared.sizes import PoolSize
from kvd_shared.socket_dir import MAX_SOCKET_PATH_BYTES, check_socket_dir

Field = Callable[[Setting], Any]  # the value that a setting means; raises ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TCP = re.compile(r"tcp://(?:\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)
SUPPORTED_DEVICES = ("cpu",)
MAX_ID = (1 << 32) - 2  # of users and groups; the one above stands for nobody known


def text(setting: Setting) -> str:
    if not isinstance(setting.value, str) or not setting.value:
        raise setting.refuse("must be a text that is not empty")
    return setting.value


def any_text(setting: Setting) -> str:
    """Also an empty one."""
    if not isinstance(setting.value, str):
        raise setting.refuse("must be a text")
    return setting.value


def one_of(*choices: str) -> Field:
    def field(setting: Setting) -> str:
        if setting.value not in choices:
            raise setting.refuse(f"must be one of {', '.join(choices)}")
        return str(setting.value)

    return field


def whole_number(setting: Setting) -> int:
    value = setting.value
    if setting.is_text and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise setting.refuse("must be a whole number of at least 1")
    return value


def whole_up_to(limit: int) -> Field:
    def field(setting: Setting) -> int:
        value = whole_number(setting)
        if value > limit:
            raise setting.refuse(f"must be a whole number from 1 to {limit}")
        return value

    return field


def _number(setting: Setting, wanted: str) -> float:
    value = setting.value
    with suppress(ValueError):  # refused below, as the text it is
        value = float(value) if setting.is_text else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise setting.refuse(f"must be {wanted}")
    return float(value)


def truth(setting: Setting) -> bool:
    value = {"true": True, "false": False}.get(setting.value) if setting.is_text else setting.value
    if not isinstance(value, bool):
        raise setting.refuse("must be true or false")
    return value


def users(setting: Setting) -> frozenset[int]:
    return _ids(setting, "user", lambda name: pwd.getpwnam(name).pw_uid)


def groups(setting: Setting) -> frozenset[int]:
    return _ids(setting, "group", lambda name: grp.getgrnam(name).gr_gid)


def _ids(setting: Setting, what: str, id_of: Callable[[str], int]) -> frozenset[int]:
    """Numbers, and names of this host. As a text they stand behind each other with commas."""
    named = setting.value
    if setting.is_text:
        parts = [part.strip() for part in named.split(",")]
        named = [int(part) if part.isdecimal() else part for part in parts if part]
    if not isinstance(named, list):
        raise setting.refuse(f'must be a list of {what}s, such as ["kvd", 1001]')
    ids = set()
    for one in named:
        if isinstance(one, str) and one:
            try:
                ids.add(id_of(one))
            except KeyError:
                raise setting.refuse(
                    f"this host has no {what} {one!r}: make it before kvd starts, or give a number"
                ) from None
        elif type(one) is int and 0 <= one <= MAX_ID:
            ids.add(one)
        else:
            raise setting.refuse(f"{one!r} is no {what}: give names, or numbers to {MAX_ID}")
    return frozenset(ids)


def seconds(setting: Setting) -> float:
    value = _number(setting, "a number of seconds")
    if not (math.isfinite(value) and value >= 0):
        raise setting.refuse("must be a number of seconds of at least 0")
    return value


def lifetime(setting: Setting) -> float:
    value = _number(setting, "a number of seconds")
    if not (math.isfinite(value) and value > 0):
        raise setting.refuse("must be a number of seconds over 0; leave it out for no end")
    return value


def share(setting: Setting) -> float:
    value = _number(setting, "a fraction of the pool, such as 0.25")
    if not 0 <= value <= 1:
        raise setting.refuse("must be from 0 to 1, a fraction of the pool")
    return value


def page_size(setting: Setting) -> int:
    value = whole_number(setting)
    if not MIN_PAGE_SIZE <= value <= MAX_PAGE_SIZE or value & (value - 1):
        raise setting.refuse(
            f"must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE} (tokens)"
        )
    return value


def pool_size(setting: Setting) -> PoolSize:
    try:
        return PoolSize.parse(text(setting))
    except ValueError as e:
        raise setting.refuse(str(e)) from e


def name(setting: Setting) -> str:
    if not _NAME.fullmatch(text(setting)):
        raise setting.refuse(
            "must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return str(setting.value)


def salt(setting: Setting) -> bytes:
    """As text. Messages do not repeat it: a tenant's salt may be its secret."""
    if not isinstance(setting.value, str):
        raise ConfigError(f"{setting.origin}: {setting.label}: must be a text; or give salt_hex")
    return setting.value.encode()


def salt_hex(setting: Setting) -> bytes:
    try:
        return bytes.fromhex(setting.value)
    except (ValueError, TypeError):
        raise ConfigError(
            f"{setting.origin}: {setting.label}: must be a text of hex digits, two a byte"
        ) from None


def folder(setting: Setting) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text(setting))))


def socket_dir(setting: Setting) -> Path:
    path = folder(setting)
    try:
        check_socket_dir(path)
    except ValueError as e:
        raise setting.refuse(str(e)) from e
    return path


def device(setting: Setting) -> str:
    if setting.value not in SUPPORTED_DEVICES:
        raise setting.refuse(f"this version supports {', '.join(SUPPORTED_DEVICES)}")
    return str(setting.value)


def endpoint(setting: Setting) -> str:
    """A ZeroMQ address to bind. Not `inproc` or an abstract name, which nobody else could find or
    everybody could take."""
    value = text(setting)
    path = value.removeprefix("ipc://")
    if path != value:
        if not path.startswith("/") or path.endswith("/"):
            raise setting.refuse("must have a file's absolute path, as in ipc:///run/kvd/events")
        size = len(os.fsencode(path))
        if size > MAX_SOCKET_PATH_BYTES:
            raise setting.refuse(
                f"is too long for a socket: {size} bytes, the limit is {MAX_SOCKET_PATH_BYTES}"
            )
        return value
    tcp = _TCP.fullmatch(value)
    if not tcp or not 1 <= int(tcp[1]) <= 65535:
        raise setting.refuse(
            "must be ipc:///PATH or tcp://ADDRESS:PORT with a port from 1 to 65535, as in "
            "ipc:///run/kvd/events or tcp://127.0.0.1:5557"
        )
    return value
