"""Settings of the orchestrator: what may be left out, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from forebay.kit.config import ConfigError, load
from forebay.orchestrator.config import OrchestratorSettings, ScorerWeights
from forebay.orchestrator.routing.scorers import SCORERS


def read(folder: Path, text: str) -> OrchestratorSettings:
    path = folder / "forebay.toml"
    path.write_text(text)
    return cast(
        "OrchestratorSettings", load({"orchestrator": OrchestratorSettings}, path=path)["orchestrator"]
    )


def test_without_configuration_the_usual_backends_are_looked_for(tmp_path: Path) -> None:
    settings = read(tmp_path, "")
    assert settings.address == "127.0.0.1:50150"
    assert [(b.name, b.address) for b in settings.backends] == [
        ("mlx", "127.0.0.1:50151"),
        ("ollama", "127.0.0.1:50152"),
        ("lmstudio", "127.0.0.1:50153"),
    ]


def test_backends_aliases_and_weights_are_read(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        """
        [orchestrator]
        default_model = "small"
        [orchestrator.aliases]
        small = { near = "tiny:1b" }
        [orchestrator.scorers]
        latency = 9
        [orchestrator.retry]
        max_attempts = 5
        [[orchestrator.backends]]
        name = "near"
        framework = "ollama"
        address = "unix:/tmp/near"
        slots = 4
        between_events_timeout = "0s"
        breaker = { consecutive_failures = 3, open_min = "500ms" }
        [[orchestrator.backends]]
        name = "off"
        address = "127.0.0.1:1"
        enabled = false
        """,
    )
    assert settings.backends[0].slots == 4
    assert settings.backends[0].breaker.consecutive_failures == 3
    assert settings.aliases == {"small": {"near": "tiny:1b"}}
    assert settings.scorers.latency == 9.0
    assert settings.retry.max_attempts == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'backends = [{name = "a", address = "x:1"}, {name = "a", address = "x:2"}]',
            "two backends are called a",
        ),
        ('backends = [{name = "A b", address = "x:1"}]', "backends.0.name"),
        ('backends = [{name = "a", address = "nowhere"}]', "write an address"),
        (
            'backends = [{name = "a", address = "x:1", enabled = false}]',
            "at least one backend must be enabled",
        ),
        ('aliases = {x = {nosuch = "y"}}', "there is no backend nosuch"),
        ('default_deadline = "2h"', "default_deadline must not be longer than max_deadline"),
        ('picker = "worst"', "picker"),
        ("[orchestrator.retry]\nmax_attempts = 0", "max_attempts"),
        ('backends = [{name = "a", address = "x:1", breaker = {open_min = "0s"}}]', "longer than 0"),
        (
            'backends = [{name = "a", address = "x:1", breaker = {open_min = "9s", open_max = "1s"}}]',
            "open_max must not be shorter",
        ),
        ("speed = 3", "there is no such key"),
    ],
)
def test_a_mistake_is_told_readably(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"[orchestrator]\n{text}")
    assert said in "\n".join(caught.value.lines)


def test_all_mistakes_that_values_make_together_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            """
            [orchestrator]
            address = "0.0.0.0:1"
            metrics_address = "unix:/tmp/x"
            web_address = "unix:/tmp/x"
            trace_url = "ftp://x"
            default_deadline = "2h"
            aliases = {x = {nosuch = "y"}, z = {neither = "y", nor = "y"}}
            placement.models = [{model = "m", backend = "nowhere"}]
            backends = [
              {name = "a", address = "x:1"}, {name = "a", address = "x:2"},
              {name = "b", address = "x:3", breaker = {open_min = "9s", open_max = "1s"}},
            ]
            """,
        )
    (nested,) = caught.value.lines
    assert "open_max must not be shorter" in nested
    text = (
        (tmp_path / "forebay.toml").read_text().replace(', breaker = {open_min = "9s", open_max = "1s"}', "")
    )
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    parts = (
        "address 0.0.0.0",
        "metrics_",
        "web_",
        "trace_url",
        "called a",
        "nosuch",
        "neither",
        "nor",
        "nowhere",
        "default_",
    )
    assert len(caught.value.lines) == len(parts)
    for line, part in zip(caught.value.lines, parts, strict=True):
        assert line.startswith(f"{tmp_path}/forebay.toml: orchestrator: ")
        assert part in line


def test_every_scorer_has_a_weight_and_every_weight_a_scorer() -> None:
    assert set(ScorerWeights.model_fields) == set(SCORERS)


def test_every_key_is_described() -> None:
    for name, field in OrchestratorSettings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("admission.ageing = 0", "ageing must be longer than 0"),
        ("admission.concurrency = 0", "orchestrator.admission.concurrency"),
        ("cache.ttl = 0", "max_bytes = 0 switches the cache off"),
        ('cache.url = "http://x"', "url begins with redis://"),
        ('coalesce = "perhaps"', "orchestrator.coalesce"),
    ],
)
def test_mistakes_about_the_queue_and_the_cache_are_told(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"[orchestrator]\n{line}")
    assert expected in caught.value.lines[0]


def test_a_remote_cache_without_its_client_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, '[orchestrator]\ncache.url = "redis://127.0.0.1/0"')
    assert "pip install 'forebay[cache]'" in caught.value.lines[0]
