"""Settings of the OpenAI bridge."""

from pathlib import Path

import pydantic
import pytest

from forebay.kit.config import ConfigError, load
from forebay.openai_bridge.config import OpenAiSettings


def read(tmp_path: Path, text: str) -> OpenAiSettings:
    path = tmp_path / "forebay.toml"
    path.write_text(f"[openai]\n{text}\n")
    settings = load({"openai": OpenAiSettings}, path=path)["openai"]
    assert isinstance(settings, OpenAiSettings)
    return settings


def test_the_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    settings = read(tmp_path, "")
    assert (settings.address, settings.name, settings.base_url) == (
        "127.0.0.1:50154",
        "openai",
        "http://127.0.0.1:8080",
    )
    assert (settings.flavor, settings.slots, settings.queue, settings.read_token()) == ("auto", 0, 64, "")


def test_a_token_comes_from_the_settings_or_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    inline = read(tmp_path, 'token = "sk-secret"')
    assert inline.read_token() == "sk-secret"
    assert "sk-secret" not in f"{inline!r} {inline}"
    (tmp_path / "token").write_text("sk-secret\n")
    named = read(tmp_path, f'token_file = "{tmp_path / "token"}"')
    assert named.read_token() == "sk-secret"
    with pytest.raises(ConfigError, match="not both"):
        read(tmp_path, f'token = "x"\ntoken_file = "{tmp_path / "token"}"')


def test_the_base_url_is_made_normal_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path, 'base_url = "localhost:8080//v1/"').base_url == "http://localhost:8080"
    with pytest.raises(ConfigError, match="http"):
        read(tmp_path, 'base_url = "ftp://x"')


@pytest.mark.parametrize("line", ["unknown = 1", 'flavor = "other"', "slots = -1", "embed_concurrency = 0"])
def test_what_makes_no_sense_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, line)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        OpenAiSettings().slots = 3  # type: ignore[misc]  # that is the test
