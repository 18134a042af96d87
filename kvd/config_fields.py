"""What each configuration key accepts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvd.config_sources import Setting
from kvd_shared.layout import DTYPE_BYTES, MAX_PAGE_SIZE, MIN_PAGE_SIZE
from kvd_shared.sizes import PoolSize
from kvd_shared.socket_dir import check_socket_dir

Field = Callable[[Setting], Any]  # the value that a setting means; raises ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
SUPPORTED_DEVICES = ("cpu",)


def text(setting: Setting) -> str:
    if not isinstance(setting.value, str) or not setting.value:
        raise setting.refuse("must be a text that is not empty")
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


def seconds(setting: Setting) -> float:
    value = setting.value
    with suppress(ValueError):  # refused below, as the text it is
        value = float(value) if setting.is_text else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise setting.refuse("must be a number of seconds")
    if not (math.isfinite(value) and value >= 0):
        raise setting.refuse("must be a number of seconds of at least 0")
    return float(value)


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


def pool_name(setting: Setting) -> str:
    if not _NAME.fullmatch(text(setting)):
        raise setting.refuse(
            "must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return str(setting.value)


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


DAEMON_FIELDS: Mapping[str, Field] = {
    "socket_dir": socket_dir,
    "log_level": one_of("debug", "info", "warning", "error"),
    "log_format": one_of("auto", "json", "console"),
    "drain_timeout_s": seconds,
}
LAYOUT_FIELDS: Mapping[str, Field] = {
    "num_layers": whole_number,
    "num_kv_heads": whole_number,
    "head_dim": whole_number,
}
POOL_FIELDS: Mapping[str, Field] = {
    "name": pool_name,
    "model": folder,
    "page_size": page_size,
    "kv_dtype": one_of("auto", *DTYPE_BYTES),
    "size": pool_size,
    "device": device,
}
