"""Which tcp endpoints need keys, and which key files are keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq.auth

from kvd.config import check_pool, load_config
from kvd.config_error import ConfigError
from kvd.events.keys import BadKeys, read_keys
from kvd.events.options import EventsOptions, reaches_out

POOL = "[[pool]]\nlayout = {num_layers = 1, num_kv_heads = 1, head_dim = 8}\n[pool.events]\n"


@pytest.mark.parametrize(
    ("endpoint", "out"),
    [
        ("ipc:///run/kvd/events", False),
        ("tcp://127.0.0.1:1", False),
        ("tcp://127.9.9.9:1", False),
        ("tcp://[::1]:1", False),
        ("tcp://localhost:1", False),
        ("tcp://*:1", True),
        ("tcp://0.0.0.0:1", True),
        ("tcp://[::]:1", True),
        ("tcp://10.0.0.7:1", True),
        ("tcp://eth0:1", True),
        ("tcp://lo:1", True),  # a name can be anything
        ("tcp://localhost.example.org:1", True),
    ],
)
def test_what_others_reach_needs_keys_or_a_word(endpoint: str, out: bool) -> None:
    assert reaches_out(endpoint) == out
    for endpoints in ((endpoint, None), ("ipc:///x", endpoint)):
        if not out:
            EventsOptions(endpoint=endpoints[0], replay_endpoint=endpoints[1])
            continue
        with pytest.raises(ValueError, match="other hosts could read every prompt there"):
            EventsOptions(endpoint=endpoints[0], replay_endpoint=endpoints[1])
        EventsOptions(endpoint=endpoints[0], replay_endpoint=endpoints[1], insecure_plaintext=True)
        EventsOptions(
            endpoint=endpoints[0],
            replay_endpoint=endpoints[1],
            secret_key_file=Path("/k"),
            client_keys=Path("/c"),
        )


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="give both"):
        EventsOptions(endpoint="tcp://*:1", secret_key_file=Path("/k"))
    with pytest.raises(ValueError, match="give both"):
        EventsOptions(endpoint="tcp://*:1", client_keys=Path("/k"))
    with pytest.raises(ValueError, match="nothing is plain"):
        EventsOptions(
            endpoint="tcp://*:1",
            secret_key_file=Path("/k"),
            client_keys=Path("/c"),
            insecure_plaintext=True,
        )


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """kvd.key, kvd.key_secret, and clients/a.key, clients/b.key"""
    (tmp_path / "clients").mkdir()
    zmq.auth.create_certificates(tmp_path, "kvd")
    for name in ("a", "b"):
        zmq.auth.create_certificates(tmp_path / "clients", name)
    (tmp_path / "kvd.key_secret").chmod(0o400)
    return tmp_path


def options(secret: Path, clients: Path) -> EventsOptions:
    return EventsOptions(endpoint="tcp://*:1", secret_key_file=secret, client_keys=clients)


def test_a_folder_or_a_file_of_clients(keys: Path) -> None:
    both = read_keys(options(keys / "kvd.key_secret", keys / "clients"))
    one = read_keys(options(keys / "kvd.key_secret", keys / "clients" / "a.key"))
    assert len(both.clients) == 2 and one.clients < both.clients
    assert "secret=" not in repr(both)


def test_bad_key_files_are_named(keys: Path) -> None:
    secret, clients = keys / "kvd.key_secret", keys / "clients"
    (keys / "none").mkdir()
    (keys / "text").write_text("no key\n")
    (keys / "bad").write_text('curve\n    public-key = "too short"\n')
    for wrong, why in (
        (options(keys / "absent", clients), "absent: No such file"),
        (options(secret, keys / "absent"), "absent is no key file"),
        (options(secret, keys / "none"), r"has no \*.key file: nobody could connect"),
        (options(secret, keys / "text"), "text is no key file"),
        (options(secret, keys / "bad"), "bad: its key"),
    ):
        with pytest.raises(BadKeys, match=why):
            read_keys(wrong)
    (keys / "kvd.key").chmod(0o400)
    with pytest.raises(BadKeys, match="has no secret key: give the"):
        read_keys(options(keys / "kvd.key", clients))
    secret.chmod(0o644)
    with pytest.raises(BadKeys, match=r"mode 0644: others could read .* chmod 0400"):
        read_keys(options(secret, clients))


def test_the_configuration_reads_them(keys: Path) -> None:
    def pool(lines: str) -> None:
        file = keys / "kvd.toml"
        file.write_text(POOL + lines)
        check_pool(load_config(file, {"KVD_SOCKET_DIR": str(keys)}, {}).pools[0])

    named = f"secret_key_file = '{keys}/kvd.key_secret'\nclient_keys = '{keys}/clients'\n"
    pool("endpoint = 'tcp://*:1'\n" + named)
    pool("endpoint = 'tcp://*:1'\ninsecure_plaintext = true\n")
    with pytest.raises(ConfigError, match=r"pool\[0\].events: endpoint tcp://\*:1: other hosts"):
        pool("endpoint = 'tcp://*:1'\n")
    (keys / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"pool 'default': events: client_keys .*nobody"):
        pool("endpoint = 'tcp://*:1'\n" + named.replace("/clients'", "/empty'"))
