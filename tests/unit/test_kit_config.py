"""Settings: what people write in a file, and what they are told when it is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import Field

from forebay.kit import config
from forebay.kit.config import Address, ByteSize, ConfigError, Duration, ServerSettings, Settings, load


class Inner(Settings):
    """A nested section."""

    depth: int = Field(1, ge=1, description="How deep.")


class Example(ServerSettings):
    """A section of a service."""

    wait: Duration = Field(timedelta(seconds=1), description="How long.")
    room: ByteSize = Field(2**20, description="How much.")
    rows: int = Field(8, ge=1, description="How many.")
    inner: Inner = Field(Inner(), description="What is inside.")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config.platformdirs, "user_config_dir", lambda name: str(tmp_path / "user"))


def example(text: str, tmp_path: Path) -> Example:
    (tmp_path / "f.toml").write_text(text)
    settings = load({"mlx": Example}, path=tmp_path / "f.toml")["mlx"]
    assert isinstance(settings, Example)
    return settings


def mistakes(text: str, tmp_path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        example(text, tmp_path)
    return caught.value.lines


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ('"250ms"', 0.25),
        ('"1.5s"', 1.5),
        ('"2m"', 120),
        ('"1h"', 3600),
        ('"1d"', 86400),
        ('"1h 30m"', 5400),
        ("2", 2),
        ("0.5", 0.5),
        ('"3"', 3),
    ],
)
def test_a_duration_is_read(written: str, seconds: float, tmp_path: Path) -> None:
    assert example(f"[mlx]\nwait = {written}", tmp_path).wait == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["250ms", "1.5s", "2m", "1h", "3d", "0s", "90m"])
def test_a_duration_is_written_as_it_is_read(text: str) -> None:
    assert config.parse_duration(
        config.format_duration(config.parse_duration(text))
    ) == config.parse_duration(text)


@pytest.mark.parametrize("written", ['"soon"', "true", "-1", '"5 parsecs"', "[1]", '""'])
def test_a_wrong_duration_says_how_to_write_one(written: str, tmp_path: Path) -> None:
    (line,) = mistakes(f"[mlx]\nwait = {written}", tmp_path)
    assert "mlx.wait: " in line
    assert "duration" in line


@pytest.mark.parametrize(
    ("written", "size"),
    [('"4KiB"', 4096), ('"1.5MB"', 1_500_000), ("17", 17), ('"17"', 17), ('"2 GiB"', 2**31)],
)
def test_a_size_is_read(written: str, size: int, tmp_path: Path) -> None:
    assert example(f"[mlx]\nroom = {written}", tmp_path).room == size


@pytest.mark.parametrize("written", ['"lots"', "true", "-1"])
def test_a_wrong_size_says_how_to_write_one(written: str, tmp_path: Path) -> None:
    (line,) = mistakes(f"[mlx]\nroom = {written}", tmp_path)
    assert "size" in line


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:65535", "localhost:0", "unix:/tmp/x"])
def test_an_address_is_accepted(address: str, tmp_path: Path) -> None:
    assert example(f'[mlx]\naddress = "{address}"', tmp_path).address == address


@pytest.mark.parametrize("address", ["", "50051", ":1", "h:x", "h:65536", "unix:", "unix:/" + "x" * 103])
def test_a_wrong_address_is_refused(address: str, tmp_path: Path) -> None:
    (line,) = mistakes(f'[mlx]\naddress = "{address}"', tmp_path)
    assert "mlx.address: " in line


def test_five_mistakes_give_five_lines(tmp_path: Path) -> None:
    lines = mistakes(
        '[mlx]\nrows = 0\nwait = "soon"\nrwos = 1\naddress = "here"\n[mlx.inner]\ndepht = 2\n', tmp_path
    )
    assert len(lines) == 5
    text = "\n".join(lines)
    assert "mlx.rows: input should be greater than or equal to 1 (got 0)" in text
    assert "mlx.rwos: there is no such key; did you mean rows?" in text
    assert "mlx.inner.depht: there is no such key; did you mean depth?" in text
    assert all(line.startswith(str(tmp_path / "f.toml")) for line in lines)


def test_an_unknown_section_is_refused_with_the_closest_name(tmp_path: Path) -> None:
    (line,) = mistakes("[olama]\n", tmp_path)
    assert line.endswith("[olama]: there is no such section; did you mean ollama?")


def test_an_unlike_key_lists_what_there_is(tmp_path: Path) -> None:
    (line,) = mistakes("[mlx.inner]\nzzzzzz = 1\n", tmp_path)
    assert line.endswith("there is no such key; there are depth")


def test_another_services_section_is_left_alone(tmp_path: Path) -> None:
    assert example("[ollama]\nanything = 1\n", tmp_path) == Example()


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_MLX__ROWS", "3")
    monkeypatch.setenv("FOREBAY_MLX__INNER__DEPTH", "7")
    settings = example('[mlx]\nrows = 2\nwait = "5s"\n', tmp_path)
    assert (settings.rows, settings.inner.depth, settings.wait) == (3, 7, timedelta(seconds=5))


def test_a_mistake_in_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_MLX__ROWS", "none")
    (line,) = mistakes("", tmp_path)
    assert line.startswith("environment variable FOREBAY_MLX__ROWS: ")


def test_an_unreadable_environment_is_a_mistake_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_MLX", "{not json")
    (line,) = mistakes("", tmp_path)
    assert line.startswith("environment: ")


def test_a_missing_file_that_was_named_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load({}, path=tmp_path / "none.toml")


def test_an_unreadable_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load({}, path=tmp_path)


@pytest.mark.parametrize("data", [b"[mlx", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(data)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load({"mlx": Example}, path=tmp_path / "f.toml")


def test_the_working_directorys_file_is_found_before_the_users(tmp_path: Path) -> None:
    assert config.find_file() is None
    assert load({"mlx": Example})["mlx"] == Example()
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "forebay.toml").write_text("[mlx]\nrows = 2\n")
    assert config.find_file() == tmp_path / "user" / "forebay.toml"
    (tmp_path / "forebay.toml").write_text("[mlx]\nrows = 3\n")
    settings = load({"mlx": Example})["mlx"]
    assert isinstance(settings, Example)
    assert settings.rows == 3


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.1.2:1", False),
        ("mac.local:1", False),
    ],
)
def test_only_loopback_is_local(address: str, local: bool) -> None:
    assert config.is_local(address) is local


def test_an_open_address_without_protection_is_refused(tmp_path: Path) -> None:
    (line,) = mistakes('[mlx]\naddress = "0.0.0.0:1"\n', tmp_path)
    assert "can be reached from other machines" in line
    assert "insecure_listen = true" in line


def test_an_open_address_is_served_when_told_so_in_plain_words(tmp_path: Path) -> None:
    assert example('[mlx]\naddress = "0.0.0.0:1"\ninsecure_listen = true\n', tmp_path).insecure_listen


def test_an_open_address_is_served_with_tls_and_tokens(tmp_path: Path) -> None:
    text = '[mlx]\naddress = "0.0.0.0:1"\ntls_certificate = "c"\ntls_key = "k"\n'
    assert "can be reached" in mistakes(text, tmp_path)[0]
    assert example(text + f'auth_token_digests = ["{"0" * 64}"]\n', tmp_path).tls_key == Path("k")
    assert example(text + 'tls_client_roots = "r"\n', tmp_path).tls_client_roots == Path("r")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('tls_key = "k"', "together"),
        ('tls_client_roots = "r"', "needs tls_certificate"),
        ('auth_token_digests = ["secret"]', "sha256sum"),
    ],
)
def test_half_a_protection_is_a_mistake(text: str, says: str, tmp_path: Path) -> None:
    assert says in mistakes(f"[mlx]\n{text}\n", tmp_path)[0]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Example().rows = 2  # type: ignore[misc]  # that is the point


def test_an_address_type_can_stand_alone() -> None:
    class Other(Settings):
        where: Address = "127.0.0.1:1"

    assert Other().where == "127.0.0.1:1"
