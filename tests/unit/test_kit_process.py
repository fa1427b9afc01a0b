"""How a process starts and ends, and what it says."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from forebay.kit import logs, ports, process, telemetry
from forebay.kit.config import ServerSettings
from forebay.kit.logs import LogSettings
from forebay.kit.server import StartError
from forebay.kit.telemetry import Telemetry, TelemetrySettings

SERVICE = """
import sys
from forebay.kit import process
from forebay.kit.config import ServerSettings
from forebay.kit.server import serving

async def serve(settings, telemetry):
    async with serving(settings, telemetry=telemetry) as up:
        process.announce("mlx", up.address)
        await process.until_stopped()

sys.exit(process.main("mlx", ServerSettings, serve))
"""


@pytest.fixture(autouse=True)
def _keep_logging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before[0], before[1]
    os.environ.pop("FOREBAY_MLX__ADDRESS", None)


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_says_where_it_listens_and_stops_cleanly_on_a_signal(number: signal.Signals) -> None:
    with start() as service:
        assert service.stdout is not None
        assert service.stdout.readline().startswith("forebay mlx listening on 127.0.0.1:")
        service.send_signal(number)
        _, errors = service.communicate(timeout=20)
    assert (service.returncode, errors) == (0, "")


def test_a_service_stops_when_its_supervisors_pipe_ends() -> None:
    with start(FOREBAY_EXIT_ON_STDIN_EOF="1") as service:
        assert service.stdout is not None
        assert service.stdin is not None
        assert "listening" in service.stdout.readline()
        service.stdin.close()
        assert service.wait(timeout=20) == 0


def test_a_wrong_configuration_exits_64_with_readable_lines_and_binds_nothing(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text('[mlx]\nadress = "x"\ngrace = "long"\n')
    with start("--config", str(tmp_path / "f.toml")) as service:
        output, errors = service.communicate(timeout=20)
    assert service.returncode == 64
    assert output == ""
    assert len(errors.splitlines()) == 2
    assert "did you mean address?" in errors


def test_a_taken_port_exits_69_with_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with start("--address", address) as service:
            _, errors = service.communicate(timeout=20)
    assert service.returncode == 69
    lines = [line for line in errors.splitlines() if line.startswith("forebay mlx:")]
    assert len(lines) == 1
    assert f"{address} cannot be bound: it is taken by " in lines[0]
    assert "Traceback" not in errors


def run(serve: object, *arguments: str) -> int:
    return process.main("mlx", ServerSettings, serve, list(arguments))  # type: ignore[arg-type]  # a test's own


def test_a_start_error_is_one_line_and_debug_shows_where_it_came_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def serve(settings: ServerSettings, tracing: Telemetry) -> None:
        raise StartError("the model is missing: fetch it")

    assert run(serve) == 69
    assert capsys.readouterr().err == "forebay mlx: the model is missing: fetch it\n"
    assert run(serve, "--debug") == 69
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_exits_70(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(settings: ServerSettings, tracing: Telemetry) -> None:
        raise ValueError("oh")

    assert run(serve) == 70
    assert "because of a fault of its own" in capsys.readouterr().err


def test_the_address_argument_goes_before_the_file(tmp_path: Path) -> None:
    seen: list[str] = []

    async def serve(settings: ServerSettings, tracing: Telemetry) -> None:
        seen.append(settings.address)

    (tmp_path / "forebay.toml").write_text('[mlx]\naddress = "127.0.0.1:1"\n')
    assert run(serve) == 0
    assert run(serve, "--address", "127.0.0.1:2") == 0
    assert seen == ["127.0.0.1:1", "127.0.0.1:2"]


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("n", logging.INFO, __file__, 1, message, arguments, None)


def test_text_logs_hold_no_control_characters_and_no_forged_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings(), service="mlx")
    logging.getLogger("x").info("a\x1b[31m\nb %s", "c\r")
    logging.getLogger("x").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert line.endswith("INFO    mlx x: a\N{REPLACEMENT CHARACTER}[31m b c ")


def test_json_logs_are_one_object_a_line_with_trace_ids(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings(format="json", level="debug"), service="mlx")
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("s") as span:
        logging.getLogger("x").warning("hello")
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("x").exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"], first["service"], first["logger"]) == (
        "warning",
        "hello",
        "mlx",
        "x",
    )
    assert first["trace_id"] == trace.format_trace_id(span.get_span_context().trace_id)
    assert "ValueError: bad" in second["exception"]


def test_text_logs_show_the_trace_and_an_exception(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings(), service="mlx")
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("s") as span:
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("x").exception("failed")
    text = capsys.readouterr().err
    assert f"trace={trace.format_trace_id(span.get_span_context().trace_id)}" in text
    assert "ValueError: bad" in text


def test_a_json_log_without_a_trace_has_no_ids(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(LogSettings(format="json"), service="mlx")
    logging.getLogger("x").info("%s", "y" * 10_000)
    entry = json.loads(capsys.readouterr().err)
    assert "trace_id" not in entry
    assert entry["message"].endswith("y [cut]")


def test_telemetry_is_off_unless_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    off = telemetry.setup("s", TelemetrySettings())
    assert not off.enabled
    off.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    on = telemetry.setup("s", TelemetrySettings())
    assert on.enabled
    on.shutdown()


def test_a_dead_collector_delays_leaving_by_at_most_five_seconds() -> None:
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracing = telemetry.setup(
            "s", TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        )
        for _ in range(2000):
            tracing.tracer.start_span("x").end()
        begin = time.monotonic()
        tracing.shutdown()
        assert time.monotonic() - begin < 5


def test_a_free_port_has_no_holder_and_a_unix_socket_none_that_can_be_asked() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening
        assert ports.holder(f"127.0.0.1:{free.getsockname()[1]}") == ""
    assert ports.holder("unix:/x") == ""
    assert ports.holder("nonsense") == ""


def test_a_holder_is_named_without_privileges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(kind: str) -> object:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", denied)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"(pid {os.getpid()})" in ports.holder(address)
    assert ports.holder(address) == ""


def test_a_holder_that_is_gone_is_still_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> object:
        raise psutil.NoSuchProcess(pid)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(psutil, "Process", gone)
        assert ports.holder(f"127.0.0.1:{taken.getsockname()[1]}") == f"pid {os.getpid()}"


async def test_a_stop_request_is_seen_inside_its_block_only() -> None:
    async with process.stop_requests() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(2):
            await stopped.wait()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
