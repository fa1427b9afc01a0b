"""The library that multiplies matrices for mlx on Linux."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from forebay.mlx_service import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has its own")

FOUND = blas.load(is_global=False) if sys.platform == "linux" else None
needs_library = pytest.mark.skipif(FOUND is None, reason="there is no OpenBLAS here")


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own: what a library was loaded with stays until the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.mark.mlx
@needs_library
def test_mlx_takes_its_products_from_the_library_that_is_loaded_first():
    """The dynamic linker says which library it found a function in."""
    program = "from forebay.mlx_service import blas; print(blas.load().path); import mlx.core as mx"
    done = run(program, LD_DEBUG="bindings")
    line = next(x for x in done.stderr.splitlines() if "symbol `cblas_sgemm'" in x and "libmlx.so [" in x)
    assert Path(done.stdout.strip()).name in line.partition(" to ")[2]


@pytest.mark.mlx
def test_products_are_right_whatever_their_shapes_and_layouts():
    from forebay.mlx_service.worker.runtime import mx

    random = np.random.default_rng(1)
    with mx.stream(mx.cpu):
        for rows, inner, columns in ((1, 7, 3), (1, 576, 1536), (16, 64, 300), (129, 257, 65)):
            a = random.normal(size=(rows, inner)).astype(np.float32)
            b = random.normal(size=(columns, inner)).astype(np.float32)
            for right in (mx.array(b).T, mx.array(np.ascontiguousarray(b.T))):
                got = np.array(mx.array(a) @ right, np.float64)
                wanted = a.astype(np.float64) @ b.T.astype(np.float64)
                cosine = (got * wanted).sum() / np.linalg.norm(got) / np.linalg.norm(wanted)
                assert cosine > 0.9999999
                assert np.abs(got - wanted).max() < 1e-3


@pytest.mark.mlx
@needs_library
def test_a_process_that_forks_computes_on_both_sides():
    program = """
import os
from forebay.mlx_service import blas
library = blas.load().path
import ctypes, numpy as np
gemm = ctypes.CDLL(library).cblas_sgemm
f = ctypes.c_float
def multiply():
    a = np.ones((512, 512), np.float32); c = np.zeros((512, 512), np.float32)
    p = lambda x: x.ctypes.data_as(ctypes.POINTER(f))
    gemm(101, 111, 111, 512, 512, 512, f(1), p(a), 512, p(a), 512, f(0), p(c), 512)
    assert (c == 512).all()
multiply()
child = os.fork()
multiply()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    run(program, FOREBAY_MLX__CPU_THREADS="2")


def test_a_library_that_is_missing_or_of_another_kind_is_harmless():
    for name in ("/nowhere/libopenblas.so", "libc.so.6", os.fsdecode(sys.executable)):
        assert blas.load({blas.LIBRARY_VARIABLE: name}) is None


def test_it_can_be_switched_off():
    assert blas.load({blas.LIBRARY_VARIABLE: "off"}) is None


def test_nothing_is_loaded_on_macos(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blas, "sys", SimpleNamespace(platform="darwin"))
    assert blas.load({}) is None


def test_the_systems_library_is_next_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: None)
    assert tuple(blas.candidates()) == blas.SYSTEM


def test_a_library_that_mlx_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch):
    config = "OpenBLAS 0.3.23"
    monkeypatch.setattr(blas, "_text", lambda library, function: config)
    with pytest.raises(blas.BlasError, match="no cblas_sgemm"):
        blas._load("libc.so.6", 1, is_global=False)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path, mode: SimpleNamespace(cblas_sgemm=None))
    config = "OpenBLAS 0.3.23 USE64BITINT DYNAMIC_ARCH"
    with pytest.raises(blas.BlasError, match="64-bit integers"):
        blas._load("libopenblas64.so.0", 1, is_global=False)


@pytest.mark.mlx
def test_factorisations_are_right_too():
    """The library brings its own LAPACK, which mlx then takes as well."""
    from forebay.mlx_service.worker.runtime import mx

    matrix = np.random.default_rng(2).normal(size=(40, 40)).astype(np.float32)
    square = matrix @ matrix.T + 40 * np.eye(40, dtype=np.float32)
    with mx.stream(mx.cpu):
        lower = np.array(mx.linalg.cholesky(mx.array(square)))
        values = np.array(mx.linalg.eigvalsh(mx.array(square)))
        inverse = np.array(mx.linalg.inv(mx.array(square)))
    assert np.allclose(lower @ lower.T, square, rtol=1e-4, atol=1e-3)
    assert np.allclose(values, np.linalg.eigvalsh(square), rtol=1e-4)
    assert np.allclose(inverse @ square, np.eye(40), atol=1e-3)


@needs_library
def test_threads_of_ours_compute_side_by_side_when_told_so():
    program = """
import ctypes
from forebay.mlx_service import blas
found = blas.load()
assert found.threads == 2
found.compute_on_callers()
assert ctypes.CDLL(found.path).openblas_get_num_threads() == 1
"""
    run(program, FOREBAY_MLX__CPU_THREADS="2")


@needs_library
def test_what_is_loaded_says_what_it_is_and_leaves_no_variable_behind():
    program = """
import json, os
from forebay.mlx_service import blas
before = dict(os.environ)
found = blas.load()
assert dict(os.environ) == before
print(json.dumps([found.path, found.version, found.kernels, found.threads, str(found)]))
"""
    kernels = blas.best_kernels()
    path, version, told, threads, text = json.loads(run(program, FOREBAY_MLX__CPU_THREADS="2").stdout)
    assert ctypes.CDLL(path)
    assert version.startswith("OpenBLAS 0.")
    assert kernels in (None, told)
    assert threads == 2
    assert text == f"{version}, {told}, 2 threads, from {path}"
    told = json.loads(run(program, FOREBAY_MLX__CPU_THREADS="1", OPENBLAS_CORETYPE="Sandybridge").stdout)
    assert told[2:4] == ["Sandybridge", 1]
    assert ", 1 thread, " in told[4]


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 3),
        ({"OPENBLAS_NUM_THREADS": "7"}, 7),
        ({"OPENBLAS_NUM_THREADS": "7", "FOREBAY_MLX__CPU_THREADS": "2"}, 2),
        ({"OPENBLAS_NUM_THREADS": "0", "FOREBAY_MLX__CPU_THREADS": "many"}, 3),
    ],
)
def test_one_core_stays_free_unless_threads_are_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int
):
    monkeypatch.setattr(blas, "usable_cores", lambda: 4)
    assert blas._thread_count(variables) == threads
    monkeypatch.setattr(blas, "usable_cores", lambda: 1)
    assert blas._thread_count({}) == 1


def test_a_containers_share_of_the_processor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blas.os, "sched_getaffinity", lambda process: set(range(8)))
    quota = tmp_path / "cpu.max"
    assert blas.usable_cores(quota) == 8
    for text, cores in (("max 100000", 8), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 8)):
        quota.write_text(text)
        assert blas.usable_cores(quota) == cores
    monkeypatch.delattr(blas.os, "sched_getaffinity")
    monkeypatch.setattr(blas.os, "cpu_count", lambda: None)
    assert blas.usable_cores(tmp_path / "none") == 1


def test_wide_kernels_are_asked_for_where_the_processor_has_what_they_need(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    assert blas.best_kernels(info) is None
    info.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f\n")
    assert blas.best_kernels(info) is None
    info.write_text("processor\t: 0\nflags\t\t: fpu " + " ".join(sorted(blas.WIDE)) + "\n")
    assert blas.best_kernels(info) == "SkylakeX"
