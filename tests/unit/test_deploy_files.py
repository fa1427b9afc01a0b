"""What the containers run is what there is: services, ports, settings, metrics and files.

No container engine runs here, so nothing is built: these tests read the files
and hold them against the code.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from forebay.cli.settings import settings_types
from forebay.kit import config, metrics
from forebay.kit.config import ServerSettings
from forebay.kit.failure import Failure, Fault
from forebay.kit.server import serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OURS = {
    "orchestrator": "orchestrator",
    "ollama-bridge": "ollama",
    "lmstudio-bridge": "lmstudio",
    "mlx-service": "mlx",
}
"""Containers of ours, and the service that each runs."""
BUILT_IN = {"up", "le"}
LABELS = {"instance", "job", "le", "alertname", "severity"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = read(ROOT / "docker-compose.yml")
    return found


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    found = config.load(settings_types(), path=DEPLOY / "forebay.toml")
    return dict(found)


def rules() -> list[dict[str, Any]]:
    return [rule for group in read(DEPLOY / "prometheus/rules.yml")["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/forebay.json").read_text())
    return found


def queries() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return found + [str(rule["expr"]) for rule in rules()]


def test_the_containers_configuration_is_one_that_every_process_takes(settings: dict[str, Any]) -> None:
    for name, service in OURS.items():
        found = settings[service]
        assert isinstance(found, ServerSettings)
        assert found.insecure_listen
        assert found.metrics_hosts == (name,)
        port = int(found.address.rpartition(":")[2])
        assert found.metrics_address == f"0.0.0.0:{port + 100}"
    named = {backend.address for backend in settings["orchestrator"].backends}
    assert named == {
        "host.docker.internal:50151",
        "mlx-service:50151",
        "ollama-bridge:50152",
        "lmstudio-bridge:50153",
    }


def test_every_container_of_ours_is_confined_and_can_drain(
    compose: dict[str, Any], settings: dict[str, Any]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, service in OURS.items():
        made = compose["services"][name]
        assert made["command"][0] == f"forebay-{service}"
        assert made["command"][0] in scripts
        assert made["read_only"] is True
        assert made["cap_drop"] == ["ALL"]
        assert made["init"] is True
        port = settings[service].address.rpartition(":")[2]
        assert made["environment"]["FOREBAY_HEALTH_ADDRESS"] == f"127.0.0.1:{port}"
        grace = settings[service].grace.total_seconds()
        assert int(made["stop_grace_period"].removesuffix("s")) > grace + 4


def test_nothing_is_published_beyond_this_machine_and_every_image_is_pinned(compose: dict[str, Any]) -> None:
    for name, made in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in made.get("ports", ())), name
        assert re.search(r":v?\d+\.\d+\.\d+$", made["image"]), name
        assert "no-new-privileges:true" in made["security_opt"]
        for secret in made.get("secrets", ()):
            assert secret in compose["secrets"]
        for volume in made.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in compose["volumes"]
    assert compose["services"]["mlx-service"]["profiles"] == ["mlx-cpu"]
    text = (ROOT / "docker-compose.yml").read_text() + (DEPLOY / "forebay.toml").read_text()
    assert not re.search(r"PASSWORD: |token = ", text), "secrets come from files"


def test_the_dashboard_is_published_and_its_links_lead_to_the_jaeger_beside_it(
    compose: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = settings["orchestrator"]
    port = found.web_address.rpartition(":")[2]
    assert f"127.0.0.1:{port}:{port}" in compose["services"]["orchestrator"]["ports"]
    assert found.web_hosts == (), "what shares the compose network is not who the page is for"
    link = urlsplit(found.trace_url)
    assert link.path == "/trace/{trace_id}"
    assert link.hostname == "localhost"
    assert f"127.0.0.1:{link.port}:{link.port}" in compose["services"]["jaeger"]["ports"]


def test_the_image_runs_as_nobody_in_particular_and_copies_what_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert len(re.findall(r"^FROM python:\d+\.\d+\.\d+-slim-\w+", text, re.MULTILINE)) == 2
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    assert "STOPSIGNAL SIGTERM" in text
    assert "HEALTHCHECK" in text
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert source in kept, f"{source} is not in the build's context"


def test_prometheus_looks_where_the_figures_are(settings: dict[str, Any]) -> None:
    jobs = read(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    targets = {target for job in jobs for each in job["static_configs"] for target in each["targets"]}
    wanted = {f"{name}:{settings[s].metrics_address.rpartition(':')[2]}" for name, s in OURS.items()}
    assert targets == wanted | {"host.docker.internal:50251"}


@pytest.mark.parametrize("query", queries())
def test_every_query_names_metrics_and_labels_that_exist(query: str) -> None:
    known = {series: each for each in metrics.CATALOG for series in each.series}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    labels = {label.replace(".", "_") for each in metrics.CATALOG for label in each.labels}
    bare = re.sub(r'"[^"]*"', '""', query)
    names = set(re.findall(r"\b(?:forebay|gen_ai|rpc)[a-z0-9_:]*", bare)) | set(re.findall(r"\bup\b", bare))
    used = names - labels
    assert used
    assert used <= set(known) | recorded | BUILT_IN, used - set(known)
    for metric, matchers in re.findall(r"((?:forebay|gen_ai|rpc)[a-z0-9_]*)\{([^}]*)\}", bare):
        of_metric = {label.replace(".", "_") for label in known[metric].labels}
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
            assert label in of_metric | LABELS, (metric, label)


def test_every_metric_is_on_the_dashboard_or_can_only_be_pushed() -> None:
    text = " ".join(queries())
    pushed = {metrics.MEMORY, metrics.PREFIXES, metrics.DRAFTS}
    missing = [m.name for m in metrics.CATALOG if m not in pushed and not any(s in text for s in m.series)]
    assert missing == []


def test_every_panel_fits_and_has_a_name_of_its_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    sources = read(DEPLOY / "grafana/provisioning/datasources/forebay.yml")["datasources"]
    variable = next(v for v in dashboard()["templating"]["list"] if v["name"] == "datasource")
    assert variable["current"]["value"] in {source["uid"] for source in sources}


def test_the_error_ratio_leaves_out_what_callers_did_wrong_and_nothing_else() -> None:
    pending = list(Failure.__subclasses__())
    callers = {"", "CANCELLED"}
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.fault is Fault.CALLER:
            callers.add(kind.reason)
    for rule in rules():
        if "record" in rule:
            (left_out,) = re.findall(r'error_type!~"([^"]*)"', rule["expr"])
            assert set(left_out.split("|")) == callers


def test_every_alert_says_what_is_wrong_and_where_to_look() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}
            assert {"summary", "description"} <= set(rule["annotations"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus")
@pytest.mark.parametrize("what", [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")])
def test_prometheus_itself_takes_the_files(what: tuple[str, ...]) -> None:
    folder = DEPLOY / "prometheus"
    done = subprocess.run(["promtool", *what], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_the_health_check_follows_a_process() -> None:
    async def check(address: str) -> int | None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(DEPLOY / "health.py"),
            env={"FOREBAY_HEALTH_ADDRESS": address},
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await process.wait()

    settings = ServerSettings.model_validate({"address": "127.0.0.1:0", "grace": "0s", "notice": "0s"})
    async with serving(settings) as up:
        assert await check(up.address) == 1
        await up.set_ready(True)
        assert await check(up.address) == 0
    assert await check(up.address) == 1
