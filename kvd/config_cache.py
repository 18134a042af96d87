"""What a pool's settings say about its cache: options, tenants, limits, events."""

from __future__ import annotations

from typing import Any

from kvd.config_check import below, num_tables
from kvd.config_error import ConfigError
from kvd.config_keys import CACHE_FIELDS, EVENT_FIELDS, LIMIT_FIELDS, TENANT_FIELDS, Fields
from kvd.config_sources import KeyPath, Settings, show_path
from kvd.events.options import EventsOptions
from kvd.options import CacheOptions, Limits, TenantShare


def cache_options(settings: Settings, pool: KeyPath) -> CacheOptions:
    """Of the pool at that path, not yet checked against its size. Raises ConfigError."""
    tenants = (*pool, "tenant")
    return CacheOptions(
        **_values(settings, pool, CACHE_FIELDS),
        tenants=tuple(
            _tenant(settings, (*tenants, number)) for number in range(num_tables(settings, tenants))
        ),
        limits=Limits(**_values(settings, (*pool, "limits"), LIMIT_FIELDS)),
    )


def events_options(settings: Settings, pool: KeyPath) -> EventsOptions | None:
    """None: the pool publishes no events. Raises ConfigError."""
    here = (*pool, "events")
    values = _values(settings, here, EVENT_FIELDS)
    if values and "endpoint" not in values:
        raise ConfigError(f"{show_path(here)}: missing: endpoint, where the events are published")
    try:
        return EventsOptions(**values) if values else None
    except ValueError as e:
        raise ConfigError(f"{show_path(here)}: {e}") from e


def _tenant(settings: Settings, here: KeyPath) -> TenantShare:
    values = _values(settings, here, TENANT_FIELDS)
    salts = [values.pop(key) for key in ("salt", "salt_hex") if key in values]
    if len(salts) != 1:
        found = "both salt and salt_hex" if salts else "neither salt nor salt_hex"
        raise ConfigError(
            f"{show_path(here)} has {found}: give one, the salt of the tenant's requests "
            '(salt = "" is whoever sends none)'
        )
    return TenantShare(salt=salts[0], **values)


def _values(settings: Settings, prefix: KeyPath, fields: Fields) -> dict[str, Any]:
    own = below(settings, prefix)
    return {key: field(own[key]) for key, field in fields.items() if key in own}
