"""kvd's configuration: what it is once all sources are read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvd.config_check import below, num_pools, refuse_pool_flags_for_many, refuse_unknown
from kvd.config_error import ConfigError
from kvd.config_fields import DAEMON_FIELDS, LAYOUT_FIELDS, POOL_FIELDS, pool_name
from kvd.config_sources import Setting, Settings, from_environment, from_file, from_flags
from kvd_shared.layout import PoolLayout
from kvd_shared.model_folder import Progress, model_fingerprint, read_model_folder
from kvd_shared.sizes import PoolSize, format_bytes
from kvd_shared.socket_dir import default_socket_dir

DEFAULT_SIZE = PoolSize(256 << 20, "bytes")
MIN_PAGES = 2  # one is read while another is written
MAX_PAGES = 1 << 31  # page ids are int32 in block tables


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    socket_dir: Path
    log_level: str = "info"
    log_format: str = "auto"
    drain_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutConfig:
    """Geometry given by hand, instead of a model folder's."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """One pool. Exactly one of `model` and `layout` is set."""

    name: str  # unique
    model: Path | None = None  # folder
    layout: LayoutConfig | None = None
    page_size: int = 16  # tokens
    kv_dtype: str = "auto"
    size: PoolSize = DEFAULT_SIZE
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvdConfig:
    daemon: DaemonConfig
    pools: tuple[PoolConfig, ...]  # at least one


def load_config(path: Path | None, env: Mapping[str, str], flags: Mapping[str, str]) -> KvdConfig:
    """The file's values, over them the environment's, over them the flags' (`--page-size`).

    Raises ConfigError. Model folders are not opened here.
    """
    settings = (from_file(path) if path else {}) | from_environment(env)
    refuse_pool_flags_for_many(settings, flags)
    settings |= from_flags(flags)
    refuse_unknown(settings)
    daemon = {key: DAEMON_FIELDS[key](s) for key, s in below(settings, ("daemon",)).items()}
    if "socket_dir" not in daemon:
        daemon["socket_dir"] = _default_socket_dir(env)
    pools = tuple(_pool(settings, number) for number in range(num_pools(settings)))
    if not pools:
        raise ConfigError("no pool is configured: add a [[pool]] with a model, or give --model")
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{names.count(name)} pools have the name {name!r}: give each its own `name`"
            )
    return KvdConfig(daemon=DaemonConfig(**daemon), pools=pools)


class ResolvedPool(NamedTuple):
    """What a pool's configuration comes to."""

    layout: PoolLayout
    num_pages: int
    model_fingerprint: str | None  # None: of any model of this layout


def resolve_pool(pool: PoolConfig, progress: Progress | None = None) -> ResolvedPool:
    """Read the pool's model folder, if it has one (all of it: the fingerprint covers the weights).

    Raises BadModelFolder, or ConfigError when the size is not enough for 2 pages.
    """
    dtype = "float32" if pool.kv_dtype == "auto" else pool.kv_dtype
    if pool.layout is not None:
        layout = PoolLayout(
            num_layers=pool.layout.num_layers,
            num_kv_heads=pool.layout.num_kv_heads,
            head_dim=pool.layout.head_dim,
            page_size=pool.page_size,
            dtype=dtype,
        )
    else:
        assert pool.model is not None
        layout = read_model_folder(pool.model).layout(pool.page_size, dtype)
    num_pages = pool.size.num_pages(layout.page_bytes)
    if not MIN_PAGES <= num_pages <= MAX_PAGES:
        raise ConfigError(
            f"pool {pool.name!r}: size = {pool.size}: is {num_pages} pages of "
            f"{format_bytes(layout.page_bytes)} ({layout.describe()}); "
            f"must be from {MIN_PAGES} to {MAX_PAGES} pages"
        )
    fingerprint = model_fingerprint(pool.model, progress) if pool.model else None
    return ResolvedPool(layout, num_pages, fingerprint)


def _pool(settings: Settings, number: int) -> PoolConfig:
    here = ("pool", number)
    own, layout = below(settings, here), below(settings, (*here, "layout"))
    values: dict[str, Any] = {key: POOL_FIELDS[key](s) for key, s in own.items()}
    model = own.get("model")
    if model and layout:
        geometry = next(iter(layout.values()))
        raise ConfigError(
            f"pool[{number}] has both a model ({model.origin}: {model.label}) and a layout "
            f"({geometry.origin}: {geometry.label}): a model folder says its layout, give one"
        )
    if model:
        folder = Setting(values["model"].name, f"pool[{number}].name", "from the model folder")
        values = {"name": values.get("name") or pool_name(folder)} | values
    elif not layout:
        raise ConfigError(f"pool[{number}] has neither a model (folder) nor a layout")
    else:
        if missing := LAYOUT_FIELDS.keys() - layout.keys():
            raise ConfigError(f"pool[{number}].layout: missing: {', '.join(sorted(missing))}")
        values["layout"] = LayoutConfig(**{k: LAYOUT_FIELDS[k](s) for k, s in layout.items()})
    return PoolConfig(**{"name": "default"} | values)


def _default_socket_dir(env: Mapping[str, str]) -> Path:
    try:
        path = default_socket_dir(env)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    return DAEMON_FIELDS["socket_dir"](Setting(str(path), "daemon.socket_dir", "default"))
