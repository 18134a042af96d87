"""kvd's configuration: what it is once all sources are read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog

from kvd.config_access import AccessConfig, access_config
from kvd.config_check import (
    below,
    num_tables,
    refuse_pool_flags_for_many,
    refuse_unknown,
    refuse_unknown_variables,
)
from kvd.config_error import ConfigError
from kvd.config_keys import DAEMON_FIELDS
from kvd.config_model import unserved
from kvd.config_pool import LayoutConfig, PoolConfig, pool_config
from kvd.config_sources import Setting, from_environment, from_file, from_flags
from kvd.events.keys import BadKeys, read_keys
from kvd.options import OptionsError, check_options
from kvd.policies import POLICIES
from kvd_shared.digest_cache import DigestCache
from kvd_shared.layout import PoolLayout
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET
from kvd_shared.model_folder import (
    Progress,
    model_fingerprint,
    read_model_folder,
    weight_files,
)
from kvd_shared.sizes import format_bytes
from kvd_shared.socket_dir import default_socket_dir

__all__ = [
    "AccessConfig",
    "DaemonConfig",
    "KvdConfig",
    "LayoutConfig",
    "PoolConfig",
    "ResolvedPool",
    "check_pool",
    "load_config",
    "resolve_pool",
]

MIN_PAGES = 2  # one is read while another is written
MAX_PAGES = 1 << 31  # page ids are int32 in block tables

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    socket_dir: Path
    log_level: str = "info"
    log_format: str = "auto"
    drain_timeout_s: float = 30.0
    max_sessions: int = 1024  # attached at once, over all pools
    death_grace_s: float = 0.0  # from the proof of a process's death to the return of its pages
    quarantine_alarm_s: float = 5.0  # how long a process may live on behind its session's end
    resume_grace_s: float = 5.0  # how long a restarted daemon waits for the sessions to resume


@dataclass(frozen=True, slots=True, kw_only=True)
class KvdConfig:
    daemon: DaemonConfig
    access: AccessConfig
    pools: tuple[PoolConfig, ...]  # at least one


def load_config(path: Path | None, env: Mapping[str, str], flags: Mapping[str, str]) -> KvdConfig:
    """The file's values, over them the environment's, over them the flags' (`--page-size`).

    Raises ConfigError. Model folders are not opened here.
    """
    refuse_unknown_variables(env)
    settings = (from_file(path) if path else {}) | from_environment(env)
    refuse_pool_flags_for_many(settings, flags)
    settings |= from_flags(flags)
    refuse_unknown(settings)
    daemon = {key: DAEMON_FIELDS[key](s) for key, s in below(settings, ("daemon",)).items()}
    if "socket_dir" not in daemon:
        daemon["socket_dir"] = _default_socket_dir(env)
    pools = tuple(
        pool_config(settings, number) for number in range(num_tables(settings, ("pool",)))
    )
    if not pools:
        raise ConfigError("no pool is configured: add a [[pool]] with a model, or give --model")
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{names.count(name)} pools have the name {name!r}: give each its own `name`"
            )
    config = KvdConfig(daemon=DaemonConfig(**daemon), access=access_config(settings), pools=pools)
    _refuse_shared_endpoints(config)
    return config


class ResolvedPool(NamedTuple):
    """What a pool's configuration comes to."""

    layout: PoolLayout
    num_pages: int
    model_fingerprint: str | None  # None: of any model of this layout
    vocab_size: int | None  # None: not known


def check_pool(pool: PoolConfig) -> None:
    """Raises what `resolve_pool` can raise, without reading the weights: for the moment before
    anything is made."""
    _sized(pool)
    if pool.model is not None:
        weight_files(pool.model)
    if pool.events is not None and pool.events.has_keys:
        try:
            read_keys(pool.events)
        except BadKeys as e:
            raise ConfigError(f"pool {pool.name!r}: events: {e}") from e


def resolve_pool(
    pool: PoolConfig, progress: Progress | None = None, cache: DigestCache | None = None
) -> ResolvedPool:
    """Read the pool's model folder, if it has one (the fingerprint covers the weights, which are
    read where `cache` does not know their digests).

    Warns of a model that modelworker does not serve. Raises BadModelFolder, or ConfigError when
    the pool is too small: for 2 pages, or for what its cache options promise.
    """
    layout, num_pages = _sized(pool)
    if pool.model is None:
        return ResolvedPool(layout, num_pages, None, None)
    folder = read_model_folder(pool.model)
    for why in unserved(folder):
        log.warning("pool.model_unserved", pool=pool.name, why=why,
                    effect="modelworker refuses this folder; other engines may attach")  # fmt: skip
    fingerprint = model_fingerprint(pool.model, progress, cache)
    return ResolvedPool(layout, num_pages, fingerprint, folder.vocab_size)


def _sized(pool: PoolConfig) -> tuple[PoolLayout, int]:
    """Layout and number of pages."""
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
    try:
        check_options(pool.cache, POLICIES, num_pages)
    except OptionsError as e:
        raise ConfigError(f"pool {pool.name!r}: {e}") from e
    return layout, num_pages


def _refuse_shared_endpoints(config: KvdConfig) -> None:
    """Two sockets on one address: the second would fail, or on ipc:// take it from the first."""
    users = {
        f"ipc://{config.daemon.socket_dir / file}": f"the daemon's {file}"
        for file in (LEASE_SOCKET, RPC_SOCKET)
    }
    for pool in config.pools:
        for key in ("endpoint", "replay_endpoint"):
            address = getattr(pool.events, key, None)
            if address in users:
                raise ConfigError(
                    f"pool {pool.name!r}: events.{key} = {address!r} is the address of "
                    f"{users[address]}, too: give each its own"
                )
            if address:
                users[address] = f"pool {pool.name!r}, events.{key}"


def _default_socket_dir(env: Mapping[str, str]) -> Path:
    try:
        path = default_socket_dir(env)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    return DAEMON_FIELDS["socket_dir"](Setting(str(path), "daemon.socket_dir", "default"))
