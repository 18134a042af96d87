"""What the configuration says about a pool's cache: options, tenants, limits, events."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvd import config_keys
from kvd.config import KvdConfig, load_config, resolve_pool
from kvd.config_error import ConfigError
from kvd.events.options import EventsOptions
from kvd.options import CacheOptions, Limits, TenantShare

POOL = "[[pool]]\nlayout = {num_layers = 2, num_kv_heads = 2, head_dim = 8}\nsize = '100 pages'\n"
ENV = {"KVD_SOCKET_DIR": "/srv/kvd"}
EXAMPLE = Path(__file__).parents[2] / "systemd" / "kvd.toml.example"


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str) -> KvdConfig:
    path = tmp_path / "kvd.toml"
    path.write_text(text)
    named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    return load_config(path, ENV | (env or {}), named)


def cache(
    tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str
) -> CacheOptions:
    return load(tmp_path, text, env, **flags).pools[0].cache


def events(tmp_path: Path, text: str, **flags: str) -> EventsOptions | None:
    return load(tmp_path, text, None, **flags).pools[0].events


def refusal(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, env, **flags)
    return str(error.value)


def test_without_a_word_about_it_the_cache_has_its_defaults(tmp_path: Path) -> None:
    (pool,) = load(tmp_path, POOL).pools
    assert (pool.cache, pool.events) == (CacheOptions(), None)
    empty = POOL + "tenant = []\n[pool.limits]\n"
    assert cache(tmp_path, empty) == CacheOptions()


def test_a_file_with_everything(tmp_path: Path) -> None:
    text = """
        policy = "lru"
        operator_quota = 0.125
        ttl_s = 60
        [pool.limits]
        max_prompt_tokens = 100
        max_pages_a_session = 50
        max_requests_a_session = 20
        [pool.events]
        endpoint = "tcp://127.0.0.1:5557"
        replay_endpoint = "ipc:///run/kvd/replay"
        topic = "kv"
        buffer_steps = 10
        hwm = 20
        heartbeat_s = 0
        [[pool.tenant]]
        name = "acme"
        salt = "né"
        min_share = 0.25
        max_share = 0.5
        ttl_s = 1.5
        [[pool.tenant]]
        salt_hex = "00ff"
        [[pool.tenant]]
        salt = ""
        """
    (pool,) = load(tmp_path, POOL + text).pools
    assert pool.cache == CacheOptions(
        policy="lru",
        operator_quota=0.125,
        ttl_s=60.0,
        tenants=(
            TenantShare(name="acme", salt="né".encode(), min_share=0.25, max_share=0.5, ttl_s=1.5),
            TenantShare(salt=b"\0\xff"),
            TenantShare(salt=b""),
        ),
        limits=Limits(max_prompt_tokens=100, max_pages_a_session=50, max_requests_a_session=20),
    )
    assert pool.events == EventsOptions(
        endpoint="tcp://127.0.0.1:5557",
        replay_endpoint="ipc:///run/kvd/replay",
        topic="kv",
        buffer_steps=10,
        hwm=20,
        heartbeat_s=0.0,
    )


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    text = POOL + (
        "operator_quota = 0.1\nttl_s = 1\nlimits = {max_prompt_tokens = 1, "
        "max_pages_a_session = 1, max_requests_a_session = 1}\n"
        "tenant = [{salt = 'a', min_share = 0.1, max_share = 0.2}]\n"
    )
    env = {
        "KVD_POOL__0__OPERATOR_QUOTA": "0.2",
        "KVD_POOL__0__TTL_S": "2.5",
        "KVD_POOL__0__LIMITS__MAX_PAGES_A_SESSION": "2",
        "KVD_POOL__0__LIMITS__MAX_REQUESTS_A_SESSION": "2",
        "KVD_POOL__0__TENANT__0__MAX_SHARE": "0.3",
        "KVD_POOL__0__TENANT__1__SALT_HEX": "62",
    }
    options = cache(tmp_path, text, env, ttl_s="3", limits="max_requests_a_session=3")
    assert (options.operator_quota, options.ttl_s) == (0.2, 3.0)
    assert options.limits == Limits(
        max_prompt_tokens=1, max_pages_a_session=2, max_requests_a_session=3
    )
    assert options.tenants == (
        TenantShare(salt=b"a", min_share=0.1, max_share=0.3),
        TenantShare(salt=b"b"),
    )


def test_the_flags(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        POOL,
        max_sessions="8",
        policy="lru",
        operator_quota="0.5",
        events="endpoint=ipc:///srv/kvd/events, topic=, hwm=5",
    )
    assert config.daemon.max_sessions == 8
    assert config.pools[0].cache.operator_quota == 0.5
    published = config.pools[0].events
    assert published is not None
    assert (published.endpoint, published.topic) == ("ipc:///srv/kvd/events", "")
    assert (published.hwm, published.replay_endpoint) == (5, None)
    assert published.heartbeat_s == EventsOptions(endpoint="").heartbeat_s
    assert "must be like max_prompt_tokens=" in refusal(tmp_path, POOL, limits="5")
    assert "--events endpint: no such key; did you mean 'endpoint'" in refusal(
        tmp_path, POOL, events="endpint=x"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("policy = 'lruu'\n", ["pool[0].policy = 'lruu'", "must be one of", "lru"]),
        ("polcy = 'lru'\n", ["pool[0].polcy: no such key", "'policy'"]),
        ("operator_quota = 1.5\n", ["pool[0].operator_quota = 1.5", "from 0 to 1"]),
        ("operator_quota = nan\n", ["= nan", "from 0 to 1"]),
        ("operator_quota = '25%'\n", ["= '25%'", "a fraction of the pool"]),
        ("operator_quota = true\n", ["= True", "a fraction of the pool"]),
        ("ttl_s = 0\n", ["pool[0].ttl_s = 0", "over 0", "leave it out"]),
        ("ttl_s = inf\n", ["= inf", "over 0"]),
        ("limits = 1\n", ["pool[0].limits = 1", "max_prompt_tokens"]),
        (
            "[pool.limits]\nmax_pages = 1\n",
            ["pool[0].limits.max_pages: no such key", "max_pages_a"],
        ),
        ("[pool.limits]\nmax_prompt_tokens = 0\n", ["limits.max_prompt_tokens = 0", "at least 1"]),
        ("tenant = 1\n", ["pool[0].tenant", "[[pool.tenant]]"]),
        ("tenant = ['a']\n", ["pool[0].tenant[0]", "[[pool.tenant]]"]),
        ("[pool.tenant]\nsalt = 'a'\n", ["pool[0].tenant.salt", "[[pool.tenant]]"]),
        ("[[pool.tenant]]\n", ["pool[0].tenant[0] has neither salt nor salt_hex"]),
        ("[[pool.tenant]]\nsalt = 'a'\nsalt_hex = '61'\n", ["[0] has both salt and salt_hex"]),
        ("[[pool.tenant]]\nsalt = 'a'\nmin = 1\n", ["tenant[0].min: no such key", "'min_share'"]),
        ("[[pool.tenant]]\nsalt = 'a'\nmax_share = 2\n", ["tenant[0].max_share = 2", "0 to 1"]),
        ("[[pool.tenant]]\nsalt = 'a'\nname = 'a b'\n", ["name = 'a b'", "1 to 64"]),
        ("[[pool.tenant]]\nsalt = 'a'\nttl_s = -1\n", ["tenant[0].ttl_s = -1", "over 0"]),
        ("events = 'tcp://*:1'\n", ["pool[0].events", "endpoint, replay_endpoint"]),
        ("events = {}\n", ["pool[0].events", "endpoint, replay_endpoint"]),
        ("[pool.events]\nhwm = 5\n", ["pool[0].events: missing: endpoint"]),
        ("[pool.events]\nendpoint = ''\n", ["events.endpoint = ''", "not empty"]),
        ("events = {endpoint = 'tcp://*:1', topic = 1}\n", ["events.topic = 1", "a text"]),
        ("events = {endpoint = 'tcp://*:1', hwm = 0}\n", ["events.hwm = 0", "at least 1"]),
        ("events = {endpoint = 'tcp://*:1', hwm = 2147483648}\n", ["from 1 to 2147483647"]),
        ("events = {endpoint = 'tcp://*:1', heartbeat_s = -1}\n", ["heartbeat_s = -1", "at least"]),
        ("events = {endpoint = 'tcp://*:1', buffer_steps = 0}\n", ["buffer_steps = 0"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, POOL + text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("KVD_POOL__0__OPERATOR_QUOTA", "half", ["= 'half'", "a fraction of the pool"]),
        ("KVD_POOL__0__LIMITS__MAX_PROMPT_TOKENS", "-1", ["= '-1'", "at least 1"]),
        ("KVD_POOL__0__LIMITS", "1", ["= '1'", "max_prompt_tokens"]),
        ("KVD_POOL__0__TENANT__1__SALT", "a", ["there is no tenant 0 before it"]),
        ("KVD_POOL__0__TENANT__SALT", "a", ["KVD_POOL__0__TENANT__0__SALT"]),
        ("KVD_POOL__0__TENANT__0", "a", ["KVD_POOL__0__TENANT__0__SALT"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    tmp_path: Path, variable: str, value: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, POOL, {variable: value})
    for part in [f"environment: {variable}", *parts]:
        assert part in message


@pytest.mark.parametrize("text", ["salt = 3141592", "salt = ['3141592']", "salt_hex = '3141592'"])
def test_a_refused_salt_is_not_repeated(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, POOL + f"[[pool.tenant]]\n{text}\n")
    assert f"pool[0].tenant[0].{text.split()[0]}: must be a text" in message
    assert "3141592" not in message


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:5557",
        "tcp://127.0.0.1:65535",
        "tcp://[::1]:5557",
        "tcp://eth0:1",
        "ipc:///run/kvd/events",
        "ipc:///" + "d" * 106,
    ],
)
def test_endpoints_that_can_be_bound(tmp_path: Path, endpoint: str) -> None:
    plain = "insecure_plaintext = true, " if re.search(r"\*|eth0", endpoint) else ""
    found = events(tmp_path, POOL + f"events = {{{plain}endpoint = '{endpoint}'}}\n")
    assert found is not None and found.endpoint == endpoint


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("127.0.0.1:5557", "must be ipc:///PATH or tcp://ADDRESS:PORT"),
        ("inproc://kvd", "must be ipc:///PATH or tcp://ADDRESS:PORT"),
        ("udp://127.0.0.1:5557", "must be ipc:///PATH or tcp://ADDRESS:PORT"),
        ("tcp://127.0.0.1", "with a port"),
        ("tcp://127.0.0.1:*", "with a port"),
        ("tcp://127.0.0.1:0", "from 1 to 65535"),
        ("tcp://127.0.0.1:65536", "from 1 to 65535"),
        ("ipc://events", "absolute path"),
        ("ipc://@events", "absolute path"),
        ("ipc:///run/kvd/", "absolute path"),
        ("ipc://", "absolute path"),
        ("ipc:///" + "d" * 107, "108 bytes, the limit is 107"),
    ],
)
def test_endpoints_that_cannot(tmp_path: Path, endpoint: str, why: str) -> None:
    for key in ("endpoint", "replay_endpoint"):
        others = {"endpoint": "tcp://*:5557"} | {key: endpoint}
        table = ", ".join(f"{name} = '{value}'" for name, value in others.items())
        message = refusal(tmp_path, POOL + f"events = {{{table}}}\n")
        assert f"pool[0].events.{key} = '{endpoint}': " in message and why in message


def test_two_sockets_on_one_address_are_refused(tmp_path: Path) -> None:
    twice = "events = {endpoint = 'tcp://127.0.0.1:1', replay_endpoint = 'tcp://127.0.0.1:1'}\n"
    assert "is the address of pool 'default', events.endpoint" in refusal(tmp_path, POOL + twice)
    one = "events = {endpoint = 'tcp://127.0.0.1:1'}\n"
    two_pools = POOL + one + POOL + "name = 'b'\n" + one
    assert "pool 'b': events.endpoint = 'tcp://127.0.0.1:1' is the address of pool" in refusal(
        tmp_path, two_pools
    )
    ours = "events = {endpoint = 'ipc:///srv/kvd/rpc.sock'}\n"
    assert "is the address of the daemon's rpc.sock" in refusal(tmp_path, POOL + ours)


def test_options_that_the_pool_cannot_hold_are_refused_by_its_name(tmp_path: Path) -> None:
    text = "operator_quota = 0.5\ntenant = [{salt = 'a', min_share = 0.49}]\n"
    (pool,) = load(tmp_path, POOL + text).pools
    with pytest.raises(ConfigError, match=r"pool 'default': .* reserve 49 \+ 50 of 100 pages"):
        resolve_pool(pool)
    (pool,) = load(tmp_path, POOL + text, pool_size="1000 pages").pools
    assert resolve_pool(pool).num_pages == 1000


def test_the_example_file_is_valid_with_all_that_is_commented_out(tmp_path: Path) -> None:
    text = re.sub(r"^# (?=\[|\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    config = load(tmp_path, text)
    llama, any_model = config.pools
    assert llama.events is not None and llama.events.buffer_steps == 10000
    assert [tenant.name for tenant in llama.cache.tenants] == ["acme"]
    assert any_model.layout is not None
    for name, fields in vars(config_keys).items():
        for key in fields if name.endswith("_FIELDS") else ():
            assert re.search(rf"\b{key} = ", text), f"{key} of {name} is not in the example"
