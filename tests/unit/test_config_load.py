# SPDX-License-Identifier: Apache-2.0
"""Where configuration comes from, in which order, and what is said about what cannot be used."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mesh.config.keys import FORMER, KEYS, Config
from mesh.config.load import config_options, load
from mesh.errors import ConfigError


def written(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    return {"config": str(file)}


def test_defaults() -> None:
    assert load({}, {}) == Config()


def test_flags_win_over_the_environment_over_the_file(tmp_path: Path) -> None:
    flags = written(tmp_path, 'engine = "kernel"\nthreads = 4\nretries = 1\nidle_timeout = 7\n')
    config = load({**flags, "threads": "9", "static_file": None}, {"MESH_THREADS": "5", "MESH_RETRIES": "2"})
    assert (config.engine, config.threads, config.retries, config.idle_timeout) == ("kernel", 9, 2, 7.0)
    assert isinstance(config.idle_timeout, float) and isinstance(config.threads, int)


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    assert load({}, {"MESH_CONFIG": written(tmp_path, "threads = 4")["config"]}).threads == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nengin = 'proxy'", r"mesh.toml:2: no such key: engin \(did you mean engine\?\)"),
        ("threads = 'four'", r"mesh.toml:1: threads must be a whole number"),
        ("threads = 1.5", "a whole number"),
        ("threads = -1", "between 0 and 1024"),
        ("retries = 17", "between 0 and 16"),
        ("idle_timeout = -1", "between 0 and 1000000000"),
        ("idle_timeout = nan", "between 0 and 1000000000"),
        ("idle_timeout = true", "must be a number"),
        ("state_dir = 7", "must be a string"),
        ("panic_threshold = 1.5", "between 0 and 1"),
        ("engine = 'ebpf'", "none of auto, kernel, proxy"),
        ("[engine]\nname = 1", "must be a string"),
        ("engine = =", "line 1"),
        ("[mesh]\nengine = 'proxy'", "no such key: mesh .keys stand at the top"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(written(tmp_path, text), {})


def test_wrong_environment_and_flags_say_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MESH_THREAD: no such key \(did you mean MESH_THREADS\?\)"):
        load({}, {"MESH_THREAD": "1"})
    with pytest.raises(ConfigError, match="MESH_RETRIES: retries must be a whole number"):
        load({}, {"MESH_RETRIES": "many"})
    with pytest.raises(ConfigError, match="--connect-timeout: connect_timeout must be a number"):
        load({"connect_timeout": "soon"}, {})
    with pytest.raises(ConfigError, match="--udp-max-sessions: udp_max_sessions must be between 0 and 1000000000, not"):
        load({"udp_max_sessions": 10**10}, {})
    with pytest.raises(ConfigError, match=r"cluster_port and peer_port are both 9552 .*each needs its own"):
        load({"cluster_port": 9552}, {})
    with pytest.raises(ConfigError, match="cluster_managers: 'm1:95510' is not host or host:port"):
        load({"cluster_managers": "m0, m1:95510"}, {})
    assert load({"cluster_managers": "m0, [fd00::1]:7, fd00::2"}, {}).managers == [
        ("m0", 9551),
        ("fd00::1", 7),
        ("fd00::2", 9551),
    ]
    with pytest.raises(ConfigError, match="tunnel_port and peer_port are both 6084"):
        load({}, {"MESH_PEER_PORT": "6084"})
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load({"config": tmp_path / "none.toml"}, {})


def test_every_key_is_a_flag() -> None:
    seen: dict[str, object] = {}

    @click.command()
    @config_options
    def command(**flags: object) -> None:
        seen.update(flags)

    given = {"str": "auto", "int": "3", "float": "0.5"}
    args = [part for f in KEYS.values() for part in (f"--{f.name.replace('_', '-')}", given[str(f.type)])]
    assert CliRunner().invoke(command, args).exit_code == 0
    assert seen.keys() == {*KEYS, *FORMER, "config"}
    text = CliRunner().invoke(command, ["--help"]).output
    assert all(f"--{f.name.replace('_', '-')}" in text for f in KEYS.values())


def test_floating_addresses_are_addresses() -> None:
    found = load({"floating_addresses": "192.0.2.9, 2001:db8::9,"}, {}).floating
    assert {str(address) for address in found} == {"192.0.2.9", "2001:db8::9"}
    with pytest.raises(ConfigError, match=r"floating_addresses.*192\.0\.2\.9/24"):
        load({"floating_addresses": "192.0.2.9/24"}, {})


def test_a_former_name_of_a_key_is_accepted_and_reported(tmp_path: Path) -> None:
    """An upgrade must not stop a node whose file, environment or unit says `vips`."""
    flags = written(tmp_path, 'threads = 2\nvips = "192.0.2.9"\n')
    for source, environ, where, said in (
        (flags, {}, f"{flags['config']}:2", "vips is deprecated (rename it to floating_addresses)"),
        ({}, {"MESH_VIPS": "192.0.2.9"}, "MESH_VIPS", "MESH_VIPS is deprecated (rename it to MESH_FLOATING_ADDRESSES)"),
        ({"vips": "192.0.2.9"}, {}, "--vips", "--vips is deprecated (rename it to --floating-addresses)"),
    ):
        config = load(source, environ)
        assert config.floating_addresses == "192.0.2.9"
        assert [str(problem) for problem in config.problems] == [f"{where}: {said}"]
    assert load(flags, {"MESH_FLOATING_ADDRESSES": "192.0.2.8"}).floating_addresses == "192.0.2.8"
    assert load(written(tmp_path, 'floating_addresses = "192.0.2.9"'), {}).problems == ()


def test_a_former_name_beside_the_present_one_is_refused(tmp_path: Path) -> None:
    flags = written(tmp_path, 'vips = "192.0.2.9"\nfloating_addresses = "192.0.2.8"\n')
    with pytest.raises(ConfigError, match=r":1.*both are set.*remove vips"):
        load(flags, {})


def test_a_former_name_is_a_flag_that_help_does_not_show() -> None:
    seen: dict[str, object] = {}

    @click.command()
    @config_options
    def command(**flags: object) -> None:
        seen.update(flags)

    assert CliRunner().invoke(command, ["--vips", "192.0.2.9"]).exit_code == 0
    assert load(seen, {}).floating_addresses == "192.0.2.9"
    assert "--vips" not in CliRunner().invoke(command, ["--help"]).output
