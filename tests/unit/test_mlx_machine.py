"""Promises of the probe of the machine and of the profile that is chosen for it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chip_readings import MACS, Mac, name, readings
from forebay.mlx_service import machine as machine_module
from forebay.mlx_service import service, tuning
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.machine import GIB, Machine, Readings, Tier, collect, interpret, probe
from forebay.mlx_service.tuning import MIB, Measured, Source, choose, profile_file, write_measured

M4_MAX = next(mac for mac in MACS if mac.chip == "Apple M4 Max" and mac.gpu == 40)
AIR = MACS[0]


def settings(tmp_path: Path, **more: object) -> MlxSettings:
    return MlxSettings.model_validate({"cache_dir": tmp_path, **more})


def measured(machine: Machine, **more: object) -> Measured:
    return Measured.model_validate(
        {
            "chip": machine.chip,
            "memory_bytes": machine.memory_bytes,
            "model": "smol",
            "time": datetime(2026, 5, 4, tzinfo=UTC),
            "prefill_chunk_token_count": 128,
            "prefill_rate": 1234.5,
            "max_rows": 5,
            "rows_ratio": 2.75,
            **more,
        }
    )


@pytest.mark.parametrize("mac", MACS, ids=name)
def test_a_mac_is_known_by_what_it_says(mac: Mac) -> None:
    machine = interpret(readings(mac))
    assert machine.complaints == ()
    assert machine.is_apple
    assert (machine.chip, machine.model, machine.gpu_core_count) == (mac.chip, mac.model, mac.gpu)
    assert machine.memory_bytes == mac.memory * GIB
    assert (machine.performance_core_count, machine.efficiency_core_count) == mac.cores
    assert ".".join(str(part) for part in machine.version) == mac.system
    assert machine.bandwidth == mac.bandwidth
    assert machine.metal_bytes / GIB == pytest.approx(mac.metal, abs=0.01)
    assert tuning.class_of(machine) == mac.profile
    assert f"{mac.memory} GiB" in machine.title
    assert f"{mac.bandwidth} GB/s" in machine.title


@pytest.mark.parametrize("mac", MACS, ids=name)
def test_every_value_of_a_profile_has_a_reason_and_fits_the_machine(mac: Mac, tmp_path: Path) -> None:
    machine = interpret(readings(mac))
    profile = choose(machine, settings(tmp_path))
    assert all(value.reason and value.source is Source.CLASS for value in profile.values().values())
    assert profile.wired_limit.value == 0
    assert 512 * MIB <= profile.cache_limit.value <= 4 * GIB
    ceiling = tuning.ceiling(machine, profile.memory_reserve.value)
    assert machine.memory_bytes // 4 <= ceiling < machine.metal_bytes
    assert profile.max_rows.value == (4 if mac.profile == "apple-small" else 8)
    applied = profile.apply(settings(tmp_path))
    assert applied.prefill_chunk_token_count == profile.prefill_chunk_token_count.value
    assert MlxSettings.model_validate(applied.model_dump()) == applied  # what is chosen could be configured


def test_larger_chips_read_longer_chunks_and_matrix_units_twice_as_long(tmp_path: Path) -> None:
    def chunk(chip: str) -> int:
        mac = next(mac for mac in MACS if mac.chip == chip and mac.memory >= 16)
        return choose(interpret(readings(mac)), settings(tmp_path)).prefill_chunk_token_count.value

    assert [chunk(f"Apple M{n}") for n in (1, 2, 3, 4)] == [512] * 4
    assert [chunk(f"Apple M4{tier}") for tier in ("", " Pro", " Max")] == [512, 1024, 2048]
    assert [chunk(f"Apple M5{tier}") for tier in ("", " Pro", " Max")] == [1024, 2048, 2048]
    assert chunk("Apple M3 Ultra") == 2048


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hw__memsize": "a lot"}, "hw.memsize says 'a lot'"),
        ({"hw__memsize": None}, "hw.memsize says nothing"),
        ({"hw__memsize": "-5"}, "hw.memsize says '-5'"),
        ({"hw__memsize": "9" * 30}, "hw.memsize"),
        ({"hw__perflevel0__physicalcpu": "0"}, "perflevel0"),
        ({"profiler": "{"}, "cores"),
        ({"profiler": "[]"}, "cores"),
        ({"profiler": '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}'}, "cores"),
        ({"profiler": '{"SPDisplaysDataType": [{"_name": "Display"}]}'}, "cores"),
        ({"profiler": '{"SPDisplaysDataType": [{"sppci_cores": "-3"}]}'}, "cores"),
        ({"kern__osproductversion": "fifteen"}, "version"),
        ({"kern__osproductversion": None, "sw_vers": ""}, "version"),
        ({"iogpu__wired_limit_mb": "999999999"}, "iogpu.wired_limit_mb"),
    ],
    ids=str,
)
def test_a_reading_that_makes_no_sense_is_a_complaint_and_no_error(
    change: dict[str, str | None], complaint: str, tmp_path: Path
) -> None:
    machine = interpret(readings(M4_MAX, **change))
    assert any(complaint in each for each in machine.complaints)
    assert machine.memory_bytes == M4_MAX.memory * GIB  # psutil knows it too
    profile = choose(machine, settings(tmp_path))
    assert profile.name == "apple-max"
    assert profile.prefill_chunk_token_count.value == 2048


@pytest.mark.parametrize("text", ["", "\0\xff", "machdep.cpu.brand_string Apple M1", ":::", "a: b\n" * 1000])
def test_whatever_sysctl_says_gives_a_machine_with_a_sane_profile(text: str, tmp_path: Path) -> None:
    machine = interpret(Readings(system="darwin", architecture="arm64", sysctl=text))
    assert machine.complaints
    profile = choose(machine, settings(tmp_path))
    assert profile.name == "cpu"
    assert profile.apply(settings(tmp_path)).max_rows == 8


@pytest.mark.parametrize(
    ("said", "tier", "generation"),
    [
        ("Apple M1 (Virtual)", Tier.BASE, 1),
        ("Apple M6 Max", Tier.MAX, 6),
        ("Apple M12", Tier.BASE, 12),
        ("Apple processor", None, 0),
        ("Apple M4Max", None, 0),
        ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", None, 0),
        ("", None, 0),
    ],
)
def test_a_chip_that_nobody_knows_yet_is_of_its_tier_and_one_that_makes_no_sense_is_of_none(
    said: str, tier: Tier | None, generation: int
) -> None:
    machine = interpret(readings(M4_MAX, machdep__cpu__brand_string=said))
    assert (machine.tier, machine.generation) == (tier, generation)
    assert bool(machine.complaints) == (tier is None and not said.startswith("Intel"))
    if generation > 5:
        assert machine.bandwidth == 0
        assert machine.has_matrix_units


def test_a_python_for_intel_is_told_from_a_native_one() -> None:
    assert not interpret(readings(AIR)).is_translated
    assert interpret(readings(AIR, sysctl__proc_translated="1")).is_translated
    assert interpret(readings(AIR, machdep__cpu__brand_string="VirtualApple @ 2.50GHz")).is_translated


def test_a_limit_of_the_gpu_that_somebody_set_is_what_the_gpu_may_use() -> None:
    machine = interpret(readings(AIR, iogpu__wired_limit_mb="7000"))
    assert machine.wired_limit_bytes == machine.metal_bytes == 7000 * MIB


def test_without_the_gpu_s_cores_the_least_bandwidth_of_the_chip_is_assumed() -> None:
    machine = interpret(readings(M4_MAX, profiler=""))
    assert machine.bandwidth == 410
    assert machine.complaints == ()


def test_linux_is_told_by_proc_and_psutil(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nmodel name\t: AMD EPYC 7763\nprocessor\t: 1\nmodel name\t: AMD EPYC 7763\n"
    )
    machine = interpret(collect(system="linux", cpuinfo=path))
    assert (machine.system, machine.chip) == ("Linux", "AMD EPYC 7763")
    assert machine.memory_bytes > 0
    assert not machine.is_apple
    assert machine.metal_bytes == machine.bandwidth == 0
    nameless = interpret(collect(system="linux", cpuinfo=tmp_path / "none"))
    assert nameless.chip
    assert interpret(Readings(system="win32", architecture="AMD64")).complaints


def test_on_this_machine_the_probe_finds_memory_and_a_name() -> None:
    machine = probe(thorough=False)
    assert machine.memory_bytes > 0
    assert machine.chip


def test_a_mac_is_asked_with_its_own_programs_and_the_slow_one_only_when_wanted() -> None:
    asked: list[str] = []

    def run(argv: tuple[str, ...]) -> str:
        asked.append(argv[0])
        return ""

    collect(system="darwin", run=run, thorough=False)  # type: ignore[arg-type]  # a test's shorthand
    assert asked == ["/usr/sbin/sysctl", "/usr/bin/sw_vers"]
    collect(system="darwin", run=run)  # type: ignore[arg-type]  # a test's shorthand
    assert asked[-1] == "/usr/sbin/system_profiler"


def test_a_program_that_is_not_there_or_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_module._run(("/nowhere/sysctl",)) == ""
    assert machine_module._run((sys.executable, "-c", "print('yes'); raise SystemExit(1)")) == "yes\n"

    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("sysctl", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert machine_module._run(("sysctl",)) == ""


def test_what_was_measured_goes_before_the_class_and_what_is_configured_before_both(tmp_path: Path) -> None:
    machine = interpret(readings(M4_MAX))
    plain = settings(tmp_path)
    write_measured(profile_file(plain), measured(machine))
    profile = choose(machine, plain)
    assert (profile.prefill_chunk_token_count.value, profile.max_rows.value) == (128, 5)
    assert profile.max_rows.source is Source.MEASURED
    for word in ("smol", "2026-05-04", str(tmp_path / "mlx-profile.json"), "2.8 times"):
        assert word in profile.max_rows.reason
    assert profile.cache_limit.source is Source.CLASS
    own = settings(tmp_path, max_rows=3, cache_limit="1GiB", memory_reserve=0, wired_limit="2GiB")
    chosen = choose(machine, own)
    assert (chosen.max_rows.value, chosen.max_rows.source) == (3, Source.CONFIGURED)
    assert (chosen.cache_limit.value, chosen.wired_limit.value) == (GIB, 2 * GIB)
    assert (chosen.memory_reserve.value, chosen.prefill_chunk_token_count.value) == (0, 128)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text(path.read_text().replace('"max_rows": 5', '"max_rows": 5000')),
        lambda path: path.write_text(path.read_text().replace("M4 Max", "M1")),
        lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["cut", "empty", "list", "absurd", "another machine", "newer", "folder"],
)
def test_a_profile_file_that_does_not_fit_is_ignored_and_that_is_said(tmp_path: Path, spoil) -> None:
    machine = interpret(readings(M4_MAX))
    path = profile_file(settings(tmp_path))
    write_measured(path, measured(machine))
    spoil(path)
    profile = choose(machine, settings(tmp_path))
    assert profile.max_rows.value == 8
    (complaint,) = profile.complaints
    assert str(path) in complaint


def test_a_profile_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = interpret(readings(M4_MAX))
    path = tmp_path / "deep" / "profile.json"
    write_measured(path, measured(machine))
    before = path.read_text()
    assert json.loads(before)["max_rows"] == 5

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_measured(path, measured(machine, max_rows=9))
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def test_the_service_tells_its_workers_what_suits_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service.machine, "probe", lambda *, thorough: interpret(readings(AIR)))
    profile_file(settings(tmp_path)).write_text("{")
    with caplog.at_level(logging.INFO):
        tuned = service.tuned(settings(tmp_path, max_rows=2))
    arguments = " ".join(service.worker_arguments(tuned))
    for words in ("--max-rows 2", "--prefill-chunk 256", f"--cache-limit {512 * MIB}", "--wired-limit 0"):
        assert words in arguments
    assert "profile apple-small" in caplog.text
    assert "is ignored" in caplog.text
