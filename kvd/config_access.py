"""Who may be what, as configured; what is not said becomes the standard rule of `kvd.access`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kvd.access import Access, Rule
from kvd.config_check import below
from kvd.config_keys import ACCESS_FIELDS
from kvd.config_sources import Settings

ROLES = ("worker", "admin", "observer")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """None: the standard rule of that role. A rule replaces it altogether."""

    worker: Rule | None = None
    admin: Rule | None = None
    observer: Rule | None = None
    show_token_ids: bool = False

    def access(self, socket_dir: Path) -> Access:
        """Of this process, whose sockets belong to the group of their directory."""
        standard = Access.standard(os.geteuid(), socket_dir.stat().st_gid)
        said = {role: rule for role in ROLES if (rule := getattr(self, role)) is not None}
        return replace(standard, show_token_ids=self.show_token_ids, **said)


def access_config(settings: Settings) -> AccessConfig:
    """Raises ConfigError, also for users and groups that this host does not have."""
    values = {key: ACCESS_FIELDS[key](s) for key, s in below(settings, ("access",)).items()}
    rules: dict[str, Rule] = {}
    for role in ROLES:
        users, groups = values.get(f"{role}_users"), values.get(f"{role}_groups")
        if users is not None or groups is not None:
            rules[role] = Rule(users or frozenset(), groups or frozenset())
    return AccessConfig(**rules, show_token_ids=values.get("show_token_ids", False))
