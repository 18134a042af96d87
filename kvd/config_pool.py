"""One pool's configuration, read from the settings of all sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvd.config_cache import cache_options, events_options
from kvd.config_check import below
from kvd.config_error import ConfigError
from kvd.config_fields import name
from kvd.config_keys import LAYOUT_FIELDS, POOL_FIELDS
from kvd.config_sources import Setting, Settings
from kvd.events.options import EventsOptions
from kvd.options import CacheOptions
from kvd_shared.sizes import PoolSize

DEFAULT_SIZE = PoolSize(256 << 20, "bytes")


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
    cache: CacheOptions = field(default_factory=CacheOptions)
    events: EventsOptions | None = None  # None: no events


def pool_config(settings: Settings, number: int) -> PoolConfig:
    """The numbered pool, whose keys are known to be right ones. Raises ConfigError."""
    here = ("pool", number)
    own, layout = below(settings, here), below(settings, (*here, "layout"))
    values: dict[str, Any] = {key: POOL_FIELDS[key](own[key]) for key in POOL_FIELDS if key in own}
    model = own.get("model")
    if model and layout:
        geometry = next(iter(layout.values()))
        raise ConfigError(
            f"pool[{number}] has both a model ({model.origin}: {model.label}) and a layout "
            f"({geometry.origin}: {geometry.label}): a model folder says its layout, give one"
        )
    if model:
        folder = Setting(values["model"].name, f"pool[{number}].name", "from the model folder")
        values = {"name": values.get("name") or name(folder)} | values
    elif not layout:
        raise ConfigError(f"pool[{number}] has neither a model (folder) nor a layout")
    else:
        if missing := LAYOUT_FIELDS.keys() - layout.keys():
            raise ConfigError(f"pool[{number}].layout: missing: {', '.join(sorted(missing))}")
        values["layout"] = LayoutConfig(**{k: LAYOUT_FIELDS[k](s) for k, s in layout.items()})
    values |= {
        "cache": cache_options(settings, here),
        "events": events_options(settings, here),
    }
    return PoolConfig(**{"name": "default"} | values)
