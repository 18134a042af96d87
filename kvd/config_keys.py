"""Which keys the configuration has, and what each accepts."""

from __future__ import annotations

from collections.abc import Mapping

from kvd import config_fields as kind
from kvd.config_fields import Field, one_of, whole_number, whole_up_to
from kvd.policies import POLICIES
from kvd_shared.layout import DTYPE_BYTES

Fields = Mapping[str, Field]

MAX_SESSIONS = 65536
MAX_HWM = (1 << 31) - 1  # an int of ZeroMQ's

DAEMON_FIELDS: Fields = {
    "socket_dir": kind.socket_dir,
    "log_level": one_of("debug", "info", "warning", "error"),
    "log_format": one_of("auto", "json", "console"),
    "drain_timeout_s": kind.seconds,
    "max_sessions": whole_up_to(MAX_SESSIONS),
    "death_grace_s": kind.seconds,
    "quarantine_alarm_s": kind.seconds,
    "resume_grace_s": kind.seconds,
}
ACCESS_FIELDS: Fields = {
    "worker_users": kind.users,
    "worker_groups": kind.groups,
    "admin_users": kind.users,
    "admin_groups": kind.groups,
    "observer_users": kind.users,
    "observer_groups": kind.groups,
    "show_token_ids": kind.truth,
}
POOL_FIELDS: Fields = {
    "name": kind.name,
    "model": kind.folder,
    "page_size": kind.page_size,
    "kv_dtype": one_of("auto", *DTYPE_BYTES),
    "size": kind.pool_size,
    "device": kind.device,
}
CACHE_FIELDS: Fields = {  # of a pool, too
    "policy": one_of(*sorted(POLICIES)),
    "operator_quota": kind.share,
    "ttl_s": kind.lifetime,
}
LAYOUT_FIELDS: Fields = {
    "num_layers": whole_number,
    "num_kv_heads": whole_number,
    "head_dim": whole_number,
}
LIMIT_FIELDS: Fields = {
    "max_prompt_tokens": whole_number,
    "max_pages_a_session": whole_number,
    "max_requests_a_session": whole_number,
}
EVENT_FIELDS: Fields = {
    "endpoint": kind.endpoint,
    "replay_endpoint": kind.endpoint,
    "topic": kind.any_text,
    "buffer_steps": whole_number,
    "hwm": whole_up_to(MAX_HWM),
    "heartbeat_s": kind.seconds,
    "secret_key_file": kind.folder,
    "client_keys": kind.folder,
    "insecure_plaintext": kind.truth,
}
TENANT_FIELDS: Fields = {
    "name": kind.name,
    "salt": kind.salt,
    "salt_hex": kind.salt_hex,
    "min_share": kind.share,
    "max_share": kind.share,
    "ttl_s": kind.lifetime,
}
# what may stand below a pool
POOL_TABLES: Mapping[str, Fields] = {
    "layout": LAYOUT_FIELDS,
    "limits": LIMIT_FIELDS,
    "events": EVENT_FIELDS,
}
POOL_KEYS = {*POOL_FIELDS, *CACHE_FIELDS, *POOL_TABLES, "tenant"}
