"""`forebay mlx doctor` and `forebay mlx bench`: what is said of each machine, and what is measured here."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

import tiny_models
from chip_readings import MACS, Mac, readings
from forebay.cli.app import main
from forebay.cli.problems import ExitCode
from forebay.kit.failure import BackendError, CapabilityUnsupported, ModelLoadFailed
from forebay.mlx_service import bench, machine, requirements
from forebay.mlx_service.bench import DECODE, PREFILL, Plan, Point, best, ratio
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Progress
from forebay.mlx_service.machine import interpret
from forebay.mlx_service.models import describe
from forebay.mlx_service.tool import Ended

QUICK = ["--lengths", "16,48,4096", "--chunks", "16,32", "--widths", "1,2", "--tokens", "2", "--rounds", "1"]


def mac(chip: str, memory: int) -> Mac:
    return next(mac for mac in MACS if mac.chip == chip and mac.memory == memory)


AIR = mac("Apple M1", 8)
M4_MAX = mac("Apple M4 Max", 128)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("FOREBAY_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine a Mac for the command, with mlx installed."""

    def become(which: Mac, **changes: str | None) -> None:
        monkeypatch.setattr(machine, "probe", lambda: interpret(readings(which, **changes)))
        monkeypatch.setattr(requirements, "missing", lambda: "")

    return become


def doctor(capsys: pytest.CaptureFixture[str], *, code: int = ExitCode.OK) -> str:
    assert main(["mlx", "doctor"]) == code
    out = capsys.readouterr().out
    assert "\x1b[" not in out  # colours appear on a terminal only
    return out


def test_it_shows_the_chip_the_profile_and_a_reason_for_each_value(on, capsys) -> None:
    on(M4_MAX)
    out = doctor(capsys)
    assert "Apple M4 Max, 40 GPU cores, 128 GiB, 546 GB/s" in out
    assert "the GPU may use about 96.0 GiB" in out
    assert "profile apple-max" in out
    for row in ("2048 tokens", "8 at once", "4.0 GiB", "12.0 GiB", "none"):
        assert row in out
    assert out.count("this class of machine") == 5
    assert 'wired_limit = "8GiB" and max_rows = 1' in out
    assert "warning" not in out


def test_json_holds_the_machine_the_profile_and_the_findings(on, capsys) -> None:
    on(AIR)
    assert main(["mlx", "doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["machine"]["chip"] == "Apple M1"
    assert said["machine"]["tier"] == "base"
    assert said["profile"]["name"] == "apple-small"
    value = said["profile"]["values"]["prefill_chunk_token_count"]
    assert (value["value"], value["source"]) == (256, "class")
    assert value["reason"]
    assert all(set(each) == {"grade", "subject", "text", "remedy"} for each in said["findings"])


def test_what_is_configured_is_shown_as_the_reason(on, capsys, home: Path) -> None:
    on(M4_MAX)
    (home / "forebay.toml").write_text("[mlx]\nmax_rows = 3\n")
    out = doctor(capsys)
    assert "3 at once" in out
    assert "[mlx] max_rows says so" in out


@pytest.mark.parametrize(
    ("which", "changes", "words"),
    [
        (AIR, {"kern__osproductversion": "13.6"}, "update macOS to 14 or newer"),
        (AIR, {"sysctl__proc_translated": "1"}, "install a Python for Apple silicon"),
        (AIR, {"machdep__cpu__brand_string": "Intel(R) Core(TM) i9-9980HK"}, "MLX needs Apple silicon"),
    ],
)
def test_a_machine_that_cannot_run_mlx_is_broken_and_the_exit_code_says_so(
    on, capsys, which: Mac, changes: dict[str, str], words: str
) -> None:
    on(which, **changes)
    out = doctor(capsys, code=ExitCode.FAILED)
    assert "broken" in out
    assert words in out


def test_without_mlx_the_exit_code_says_so_and_the_remedy_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(requirements, "missing", lambda: "MLX is not installed: pip install 'forebay[mlx]'")
    assert "pip install 'forebay[mlx]'" in doctor(capsys, code=ExitCode.FAILED)
    assert main(["mlx", "bench"]) == ExitCode.UNAVAILABLE
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "changes", "toml", "words"),
    [
        (mac("Apple M5 Max", 128), {"kern__osproductversion": "26.1"}, "", "update macOS to 26.2"),
        (AIR, {"iogpu__wired_limit_mb": "7900"}, "", "iogpu.wired_limit_mb leaves macOS less than 3.0 GiB"),
        (AIR, {}, 'wired_limit = "1GiB"', "does nothing before macOS 15"),
        (M4_MAX, {}, 'wired_limit = "100GiB"', "more than the GPU may use"),
        (M4_MAX, {}, 'wired_limit = "20GiB"', "have panicked macOS kernels"),
        (AIR, {}, 'memory_reserve = "9GiB"', "memory_reserve is all there is"),
    ],
)
def test_what_will_not_go_well_is_a_warning_with_a_remedy(
    on, capsys, home: Path, which: Mac, changes: dict[str, str], toml: str, words: str
) -> None:
    on(which, **changes)
    (home / "forebay.toml").write_text(f"[mlx]\n{toml}\n")
    out = doctor(capsys)
    assert words in out
    assert "warning" in out
    assert "do: " in out


def test_what_is_worth_knowing_is_a_note(on, capsys, home: Path) -> None:
    on(M4_MAX, hw__memsize="much", iogpu__wired_limit_mb="100000")
    (home / "forebay.toml").write_text('[mlx]\nwired_limit = "20GiB"\nmax_rows = 1\n')
    out = doctor(capsys)
    assert "sysctl hw.memsize says 'much': it is judged without" in out
    assert "20.0 GiB are wired, one reply at once" in out
    assert "as sysctl iogpu.wired_limit_mb says" in out
    assert "warning" not in out
    on(M4_MAX, kern__osproductversion=None, sw_vers="")
    assert "macOS cannot be read" in doctor(capsys)


def test_on_linux_it_says_that_mlx_runs_on_the_cpu(capsys, home: Path) -> None:
    (home / "forebay.toml").write_text('[mlx]\nwired_limit = "1GiB"\n')
    out = doctor(capsys, code=ExitCode.FAILED if requirements.missing() else ExitCode.OK)
    assert "MLX runs on the CPU here" in out
    assert "wired_limit does nothing without Metal" in out


def test_models_that_do_not_fit_are_named_with_their_sizes(on, capsys, home: Path) -> None:
    on(AIR)
    models = home / "models"
    tiny_models.build_random(models / "a")
    tiny_models.build_random(models / "b")
    (tiny_models.build_random(models / "bad") / "config.json").write_text("{")
    size = describe.describe(models / "a").weight_bytes
    toml = f'model_folders = ["{models}"]\npreload = ["a", "b", "bad", "gone"]\nmemory_ceiling = '
    (home / "forebay.toml").write_text(f"[mlx]\n{toml}{size * 3 // 2}\n")
    out = doctor(capsys)
    assert "the models of the start take" in out
    assert "one reply can have at most" in out
    assert "bad cannot be loaded" in out
    assert "gone is not on disk yet" in out
    (home / "forebay.toml").write_text(f"[mlx]\n{toml}1000\n")
    assert doctor(capsys).count("it does not fit") == 2


def test_a_wrong_configuration_exits_64(home: Path, capsys) -> None:
    (home / "forebay.toml").write_text("[mlx]\nmax_rows = 0\n")
    assert main(["mlx", "doctor"]) == ExitCode.CONFIG
    assert "max_rows" in capsys.readouterr().err


def point(kind: str, length: int, size: int, *rates: float) -> Point:
    return Point(kind=kind, length=length, size=size, rates=rates)


def test_of_sizes_that_are_equally_good_the_smallest_is_best_at_the_longest_prompt() -> None:
    points = [
        point(PREFILL, 16, 16, 900.0),
        point(PREFILL, 64, 16, 100.0, 101.0, 40.0),
        point(PREFILL, 64, 32, 196.0),
        point(PREFILL, 64, 64, 200.0),
        point(DECODE, 64, 1, 10.0),
        point(DECODE, 64, 4, 31.0),
        point(DECODE, 64, 8, 32.0),
        point(DECODE, 16, 8, 99.0),
    ]
    found = best(points)
    assert (found.chunk.size, found.rows.size) == (32, 4)
    assert found.rows_ratio == pytest.approx(3.1)
    assert points[1].rate == 100.0
    assert points[1].spread == pytest.approx(0.61)
    assert ratio(points[3], points) == 2.0
    assert point(DECODE, 1, 1, 0.0).spread == 0.0
    assert ratio(point(DECODE, 1, 1, 0.0), [point(DECODE, 1, 1, 0.0)]) == 0.0


@pytest.mark.parametrize(
    "arguments",
    [["--lengths", "x"], ["--chunks", "1"], ["--widths", "0,1"], ["--widths", "65"], ["--lengths", "-3"]],
)
def test_figures_that_make_no_sense_are_refused_at_once(arguments: list[str], capsys) -> None:
    assert main(["mlx", "bench", *arguments]) == ExitCode.USAGE
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.mlx
def test_what_a_benchmark_writes_is_what_the_service_uses_and_the_doctor_shows(home: Path, capsys) -> None:
    folder = tiny_models.build_random(home / "tiny", context=64)
    assert main(["mlx", "bench", "--model", str(folder), *QUICK, "--write"]) == 0
    captured = capsys.readouterr()
    path = home / "cache" / "mlx-profile.json"
    assert "measuring: loading the model" in captured.err
    assert f"written to {path}" in captured.out
    for word in ("reading, tokens a step", "writing, replies at once", "spread", "ratio", "best: ", "48"):
        assert word in captured.out
    assert "4096" not in captured.out  # more than the model's context
    chosen = json.loads(path.read_text())
    assert chosen["model"] == "tiny"
    shown = doctor(capsys)
    assert f"{chosen['prefill_chunk_token_count']} tokens" in shown
    assert str(path) in shown
    assert shown.count("measured here") == 2


def test_json_holds_every_point_and_what_is_best(on, capsys, monkeypatch) -> None:
    on(AIR)
    points = [point(PREFILL, 16, 16, 1.0), point(PREFILL, 16, 32, 3.0), point(DECODE, 16, 1, 1.0)]

    async def measured(*_: object, **__: object) -> tuple[str, list[Point]]:
        return "m", points

    monkeypatch.setattr("forebay.cli.mlx._measure", measured)
    assert main(["mlx", "bench", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["best"] == {"prefill_chunk_token_count": 32, "max_rows": 1, "rows_ratio": 1.0}
    assert said["points"][1] == {
        "kind": "prefill",
        "prompt_token_count": 16,
        "size": 32,
        "tokens_per_second": 3.0,
        "rounds": [3.0],
        "ratio": 3.0,
    }
    assert said["written"] is None
    assert said["machine"]["chip"] == "Apple M1"


@pytest.mark.mlx
async def test_a_folder_that_holds_no_model_fails_with_the_reason(tmp_path: Path) -> None:
    folder = tiny_models.build_random(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackendError, match="holds no model"):
        await bench.measure(folder, Plan(), settings=MlxSettings(), ceiling=1 << 40)


@pytest.mark.mlx
def test_what_does_not_fit_the_context_or_the_memory_is_left_out() -> None:
    from forebay.mlx_service.worker.bench import Trial, trials
    from forebay.mlx_service.worker.memory import KvCost

    wanted = Namespace(lengths=[16, 64, 4096], chunks=[16, 32, 512], widths=[1, 4], tokens=2, ceiling=1000)
    cost = KvCost(layers=(), fixed=100)
    found = trials(wanted, context=100, weights=800, cost=cost)
    assert found == [
        Trial(PREFILL, 16, 16),
        Trial(PREFILL, 64, 16),
        Trial(PREFILL, 64, 32),
        Trial(DECODE, 16, 1),
        Trial(DECODE, 64, 1),
    ]
    assert not trials(wanted, context=100, weights=901, cost=cost)


async def test_nothing_to_measure_is_an_error(tmp_path: Path, monkeypatch) -> None:
    async def nothing(argv, *, env, on_line):
        return Ended(code=0, tail=())

    monkeypatch.setattr(bench, "run_tool", nothing)
    with pytest.raises(BackendError, match="too small"):
        await bench.measure(tmp_path, Plan(), settings=MlxSettings(), ceiling=1)


async def test_a_benchmark_that_crashes_says_what_it_said_last(tmp_path: Path, monkeypatch) -> None:
    async def crash(argv, *, env, on_line):
        on_line("a library prints")
        return Ended(code=-6, tail=("terminate called",))

    monkeypatch.setattr(bench, "run_tool", crash)
    with pytest.raises(BackendError, match="the benchmark failed: terminate called"):
        await bench.measure(tmp_path, Plan(), settings=MlxSettings(), ceiling=1)


async def test_models_are_found_by_name_and_what_cannot_be_measured_is_refused(home: Path) -> None:
    models = home / "models"
    tiny_models.build_random(models / "whole")
    (tiny_models.build_random(models / "bad") / "config.json").write_text("{")
    encoder = tiny_models.build_random(models / "encoder")
    (encoder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    settings = MlxSettings(model_folders=(models,), aliases={"other": "whole"})

    def silent(step: object) -> None:
        pass

    assert await bench.find_model(settings, "other", silent) == ("whole", models / "whole")
    with pytest.raises(ModelLoadFailed):
        await bench.find_model(settings, "bad", silent)
    with pytest.raises(CapabilityUnsupported, match="embeds"):
        await bench.find_model(settings, "encoder", silent)


def test_a_model_that_is_not_here_exits_66(on, capsys) -> None:
    on(AIR)
    assert main(["mlx", "bench", "--model", "nowhere"]) == ExitCode.NOT_FOUND
    assert "nowhere" in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_says_where(on, capsys, home: Path, monkeypatch) -> None:
    on(AIR)
    points = [point(PREFILL, 16, 16, 1.0, 2.0), point(DECODE, 16, 1, 1.0)]

    async def measured(*_: object, **__: object) -> tuple[str, list[Point]]:
        return "m", points

    monkeypatch.setattr("forebay.cli.mlx._measure", measured)
    assert main(["mlx", "bench"]) == 0
    captured = capsys.readouterr()
    assert "rounds differ a lot" in captured.err
    assert "--write makes the service use this" in captured.err
    (home / "forebay.toml").write_text('[mlx]\nprofile_file = "/proc/none/profile.json"\n')
    assert main(["mlx", "bench", "--write"]) == ExitCode.FAILED
    assert "/proc/none/profile.json cannot be written" in capsys.readouterr().err


def test_a_gguf_file_s_conversion_is_shown_on_the_bar(on, capsys, monkeypatch) -> None:
    on(AIR)

    async def find(settings, name, report):
        report(Progress(what="converting", done=1, total=2))
        report(Progress(what="converting"))
        return "m", Path("m")

    async def measure(folder, plan, *, settings, ceiling, on_step):
        on_step(bench.Step(what="reading", fraction=0.5))
        return [point(PREFILL, 16, 16, 1.0), point(DECODE, 16, 1, 1.0)]

    monkeypatch.setattr(bench, "find_model", find)
    monkeypatch.setattr(bench, "measure", measure)
    assert main(["mlx", "bench"]) == 0
    err = capsys.readouterr().err
    assert "measuring: converting 50%" in err
    assert "measuring: reading 50%" in err
