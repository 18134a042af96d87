import json
import time
from pathlib import Path

import pytest

from kvd.config import KvdConfig, LayoutConfig, check_pool, load_config, resolve_pool
from kvd.config_error import ConfigError
from kvd_shared.digest_cache import DigestCache
from kvd_shared.model_folder import BadModelFolder
from kvd_shared.sizes import PoolSize

POOL = "[[pool]]\nlayout = {num_layers = 2, num_kv_heads = 2, head_dim = 8}\n"
ENV = {"XDG_RUNTIME_DIR": "/run/user/7"}


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str) -> KvdConfig:
    path = tmp_path / "kvd.toml"
    path.write_text(text)
    named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    return load_config(path, ENV | (env or {}), named)


def refusal(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, env, **flags)
    return str(error.value)


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, POOL, {"KVD_SOCKET_DIR": "/srv/kvd"})
    assert config.daemon.socket_dir == Path("/srv/kvd")
    assert (config.daemon.log_level, config.daemon.log_format) == ("info", "auto")
    assert (config.daemon.drain_timeout_s, config.daemon.max_sessions) == (30, 1024)
    (pool,) = config.pools
    assert pool.layout == LayoutConfig(num_layers=2, num_kv_heads=2, head_dim=8)
    assert (pool.name, pool.model, pool.page_size) == ("default", None, 16)
    assert (pool.kv_dtype, pool.size, pool.device) == ("auto", PoolSize(256 << 20, "bytes"), "cpu")


def test_a_file_with_everything(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [daemon]
        socket_dir = "/srv/kvd"
        log_level = "debug"
        log_format = "json"
        drain_timeout_s = 2.5
        [[pool]]
        name = "big"
        model = "/models/Big-1B"
        page_size = 32
        kv_dtype = "bfloat16"
        size = "4096 pages"
        device = "cpu"
        [[pool]]
        [pool.layout]
        num_layers = 1
        num_kv_heads = 2
        head_dim = 3
        """,
    )
    assert config.daemon.drain_timeout_s == 2.5
    big, default = config.pools
    assert (big.name, big.model, big.layout) == ("big", Path("/models/Big-1B"), None)
    assert (big.page_size, big.kv_dtype) == (32, "bfloat16")
    assert big.size == PoolSize(4096, "pages")
    assert default.layout == LayoutConfig(num_layers=1, num_kv_heads=2, head_dim=3)


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    text = '[daemon]\nlog_level = "error"\n' + POOL + 'page_size = 8\nsize = "8 pages"\n'
    env = {"KVD_DAEMON__LOG_LEVEL": "warning", "KVD_POOL__0__PAGE_SIZE": "32"}
    from_file = load(tmp_path, text)
    assert (from_file.daemon.log_level, from_file.pools[0].page_size) == ("error", 8)
    from_env = load(tmp_path, text, env)
    assert (from_env.daemon.log_level, from_env.pools[0].page_size) == ("warning", 32)
    from_flag = load(tmp_path, text, env, log_level="info", page_size="64")
    assert (from_flag.daemon.log_level, from_flag.pools[0].page_size) == ("info", 64)
    assert from_flag.pools[0].size == PoolSize(8, "pages")  # what nobody overrode


def test_no_file_is_needed() -> None:
    env = ENV | {"KVD_POOL__0__LAYOUT__HEAD_DIM": "8", "HOME": "/root", "KVDX": "1"}
    flags = {"--layout": "num_layers=2, num_kv_heads=2"}
    (pool,) = load_config(None, env, flags).pools
    assert pool.layout == LayoutConfig(num_layers=2, num_kv_heads=2, head_dim=8)


def test_a_pool_is_named_after_its_model_folder(tmp_path: Path) -> None:
    assert load(tmp_path, "", model="/models/Qwen3-0.6B/").pools[0].name == "Qwen3-0.6B"
    assert load(tmp_path, "", model="/models/my model", pool_name="m").pools[0].name == "m"
    assert "pool[0].name = 'my model'" in refusal(tmp_path, "", model="/models/my model")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[deamon]\n", ["deamon: no such section; did you mean 'daemon'?"]),
        ("[daemon]\nlog_lvl = 1\n", ["daemon.log_lvl: no such key", "'log_level'"]),
        (POOL + "pagesize = 8\n", ["pool[0].pagesize: no such key", "'page_size'"]),
        (POOL.replace("head_dim", "heads"), ["pool[0].layout.heads: no such key", "'head_dim'"]),
        (POOL + "size.min = '1MiB'\n", ["pool[0].size.min: no such key", "'size'"]),
        (POOL + "page_size = 12\n", ["pool[0].page_size = 12", "power of two from 8 to 256"]),
        (POOL + "page_size = 512\n", ["= 512", "from 8 to 256"]),
        (POOL + "page_size = '16'\n", ["= '16'", "whole number"]),
        (POOL + "page_size = true\n", ["= True", "whole number"]),
        (POOL + "size = 64\n", ["pool[0].size = 64", "must be a text"]),
        (POOL + "size = '64MB'\n", ["pool[0].size = '64MB'", "MiB", "pages"]),
        (POOL + "kv_dtype = 'fp8'\n", ["= 'fp8'", "auto, float32, bfloat16, float16"]),
        (POOL + "device = 'cuda:0'\n", ["= 'cuda:0'", "this version supports cpu"]),
        (POOL + "name = 'a b'\n", ["pool[0].name = 'a b'", "1 to 64"]),
        (POOL.replace("= 8", "= 0"), ["pool[0].layout.head_dim = 0", "at least 1"]),
        ("[daemon]\nlog_level = 3\n" + POOL, ["= 3", "debug, info, warning, error"]),
        ("[daemon]\ndrain_timeout_s = -1\n" + POOL, ["= -1", "at least 0"]),
        ("[daemon]\ndrain_timeout_s = inf\n" + POOL, ["= inf", "at least 0"]),
        ("[daemon]\ndrain_timeout_s = '3'\n" + POOL, ["= '3'", "number of seconds"]),
        ("[daemon]\nmax_sessions = 0\n" + POOL, ["daemon.max_sessions = 0", "at least 1"]),
        ("[daemon]\nmax_sessions = 65537\n" + POOL, ["= 65537", "from 1 to 65536"]),
        ("[pool]\nsize = '1MiB'\n", ["pool: must be written as [[pool]]"]),
        ("pool = [1]\n", ["pool[0]", "[[pool]]"]),
        ("daemon = 1\n", ["daemon: must be written as [daemon]"]),
        ("[[pool]]\nlayout = 1\n", ["pool[0].layout = 1", "num_layers, num_kv_heads, head_dim"]),
        ("[[pool]]\n", ["pool[0] has neither a model (folder) nor a layout"]),
        ("[[pool]]\nlayout = {head_dim = 1}\n", ["missing: num_kv_heads, num_layers"]),
        (POOL + "model = '/m'\n", ["pool[0] has both a model", "pool[0].layout.num_layers"]),
        (POOL + POOL, ["2 pools have the name 'default'"]),
        ("[daemon]\n", ["no pool is configured"]),
        ("pool = []\n", ["no pool is configured"]),
        ("[daemon\n", ["not TOML", "line 1"]),
        (f"[daemon]\nsocket_dir = '/{'d' * 100}'\n" + POOL, ["has 112 bytes, the limit is 107"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("KVD_POOL__0__SIZ", "1MiB", ["no such key", "'size'"]),
        ("KVD_POOL__0__PAGE_SIZE", "many", ["KVD_POOL__0__PAGE_SIZE = 'many'", "whole number"]),
        ("KVD_POOL__0__PAGE_SIZE", "-8", ["= '-8'", "at least 1"]),
        ("KVD_POOL__2__PAGE_SIZE", "8", ["there is no pool 1 before it"]),
        ("KVD_POOL__SIZE", "8 pages", ["KVD_POOL__0__SIZE"]),
        ("KVD_POOL__0", "8", ["KVD_POOL__0__SIZE"]),
        ("KVD_DEAMON__LOG_LEVEL", "info", ["no such section", "'daemon'"]),
        ("KVD_DAEMON__LOG_LEVEL", "", ["= ''", "debug, info"]),
        ("KVD_DAEMON__DRAIN_TIMEOUT_S", "soon", ["= 'soon'", "number of seconds"]),
        ("KVD_DAEMON__DRAIN_TIMEOUT_S", "nan", ["= 'nan'", "number of seconds"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    tmp_path: Path, variable: str, value: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, POOL, {variable: value})
    for part in [f"environment: {variable}", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("KVD_LOG_LEVEL", "did you mean KVD_DAEMON__LOG_LEVEL?"),
        ("KVD_DAEMON_LOG_LEVEL", "did you mean KVD_DAEMON__LOG_LEVEL?"),
        ("KVD_POOL_SIZE", "did you mean KVD_POOL__0__SIZE?"),
        ("KVD_SOCKETDIR", "did you mean KVD_DAEMON__SOCKET_DIR?"),
        ("KVD_QUOTA_X", "known are KVD_SOCKET_DIR and such as KVD_DAEMON__LOG_LEVEL"),
    ],
)
def test_a_variable_that_sets_nothing_is_refused(tmp_path: Path, variable: str, hint: str) -> None:
    message = refusal(tmp_path, POOL, {variable: "1"})
    assert message == f"environment: {variable}: no such setting; {hint}"


def test_what_kubernetes_sets_for_a_service_named_kvd_is_not_taken_for_settings(
    tmp_path: Path,
) -> None:
    env = {
        "KVD_PORT": "tcp://10.0.0.1:5557",
        "KVD_PORT_5557_TCP": "tcp://10.0.0.1:5557",
        "KVD_PORT_5557_TCP_ADDR": "10.0.0.1",
        "KVD_SERVICE_HOST": "10.0.0.1",
        "KVD_SERVICE_PORT_EVENTS": "5557",
        "KVD_METRICS_SERVICE_PORT": "9100",
    }
    assert load(tmp_path, POOL, env).pools[0].name == "default"


def test_what_is_wrong_in_a_flag_is_named(tmp_path: Path) -> None:
    assert "command line: --page-size = '12'" in refusal(tmp_path, POOL, page_size="12")
    assert "--layout = '2x2x8': must be like num_layers=2" in refusal(tmp_path, "", layout="2x2x8")
    assert "--layout heads: no such key" in refusal(tmp_path, "", layout="heads=2")
    assert "--layout head_dim = 'x'" in refusal(
        tmp_path, "", layout="num_layers=1,num_kv_heads=1,head_dim=x"
    )
    assert "command line: --model" in refusal(tmp_path, POOL, model="/m")


def test_a_pool_flag_is_refused_where_there_are_several_pools(tmp_path: Path) -> None:
    message = refusal(tmp_path, POOL + POOL + "name = 'b'\n", pool_size="1MiB")
    assert "--pool-size is for a single pool, but 2 are configured" in message
    assert "KVD_POOL__<number>__SIZE" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml", ENV, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not TOML"):
        load_config(tmp_path / "binary.toml", ENV, {})


def test_without_any_directory_for_sockets_the_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 7)
    with pytest.raises(ConfigError, match="KVD_SOCKET_DIR"):
        load_config(None, {}, {"--model": str(tmp_path)})


def test_a_layout_resolves_to_pages(tmp_path: Path) -> None:
    (pool,) = load(tmp_path, POOL + "size = '1MiB'\nkv_dtype = 'float16'\n").pools
    layout, num_pages, fingerprint, _ = resolve_pool(pool)
    assert layout.page_bytes == 16 * 2 * 2 * 2 * 8 * 2 and layout.dtype == "float16"
    assert (num_pages, fingerprint) == ((1 << 20) // layout.page_bytes, None)


@pytest.mark.parametrize("size", ["1 pages", "4095 B", "2147483649 pages"])
def test_a_pool_of_too_few_or_too_many_pages_is_refused(tmp_path: Path, size: str) -> None:
    (pool,) = load(tmp_path, POOL + f"size = '{size}'\n").pools
    with pytest.raises(ConfigError, match=r"pool 'default': size = .* from 2 to 2147483648 pages"):
        resolve_pool(pool)


def test_a_model_folder_resolves_to_its_geometry_and_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 128,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    seen: list[tuple[int, int]] = []
    (pool,) = load(tmp_path, "", model=str(folder), pool_size="10 pages").pools
    resolved = resolve_pool(pool, lambda done, total: seen.append((done, total)))
    assert resolved.layout.describe() == "3 layers x 2 kv heads x 32, float32, page 16 tokens"
    assert resolved.num_pages == 10 and seen == [(7, 7)]
    (folder / "model.safetensors").write_bytes(b"weightz")
    again = resolve_pool(pool)
    assert resolved.model_fingerprint and resolved.model_fingerprint != again.model_fingerprint


def test_an_absent_model_folder_is_refused(tmp_path: Path) -> None:
    (pool,) = load(tmp_path, "", model=str(tmp_path / "absent")).pools
    for refuse in (check_pool, resolve_pool):
        with pytest.raises(BadModelFolder, match="absent"):
            refuse(pool)


def write_tiny_config(folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": 8,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_without_weights_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_tiny_config(tmp_path)
    (pool,) = load(tmp_path, "", model=str(tmp_path), pool_name="m").pools
    with pytest.raises(BadModelFolder, match="has neither"):
        check_pool(pool)
    (tmp_path / "model.safetensors").write_bytes(b"")
    check_pool(pool)


def test_digests_come_from_the_cache_that_is_given(tmp_path: Path) -> None:
    write_tiny_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (pool,) = load(tmp_path, "", model=str(tmp_path), pool_name="m").pools
    later_ns = time.time_ns() + 10**12
    without = resolve_pool(pool).model_fingerprint
    for num_hits in (0, 1):
        cache = DigestCache(tmp_path / "cache", lambda: later_ns)
        assert resolve_pool(pool, None, cache).model_fingerprint == without
        assert cache.num_hits == num_hits
