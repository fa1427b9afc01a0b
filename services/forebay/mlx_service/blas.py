"""Finds a fast BLAS for mlx on Linux, where mlx brings a slow one.

mlx's build for CPUs is linked with the reference BLAS, which multiplies
matrices at the pace of one scalar unit. Its symbols are looked up among what is
loaded for everybody first, so an OpenBLAS that is loaded like that before mlx is
imported does the work instead, some forty times faster. On macOS mlx uses
Apple's own, and nothing is done.

Nothing here imports mlx, so that `forebay doctor` can ask too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIBRARY_VARIABLE = "FOREBAY_MLX__CPU_BLAS"
"""Environment variable of the setting `cpu_blas`: workers are told by it, since they need it so early."""

THREADS_VARIABLE = "FOREBAY_MLX__CPU_THREADS"
"""Environment variable of the setting `cpu_threads`."""

AUTO = "auto"
OFF = "off"

PACKAGE = "scipy_openblas32"
"""The package that carries OpenBLAS. Versions from 0.3.24 on rename all symbols: mlx does not see them."""

SYSTEM = ("libopenblas.so.0", "libopenblasp.so.0")
"""Names under which Linux distributions have it. Those with 64-bit integers are refused."""

WIDE = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
"""What a processor needs for OpenBLAS's kernels for AVX-512."""

WIDE_KERNELS = "SkylakeX"
"""Their name. OpenBLAS takes lesser ones on processors that are younger than it."""

_CORETYPE = "OPENBLAS_CORETYPE"
_NUM_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blas:
    """A BLAS that does mlx's matrix products."""

    path: str
    """The library."""
    version: str
    """Such as `OpenBLAS 0.3.23.dev`."""
    kernels: str
    """For which processors its kernels are, such as `Haswell`."""
    threads: int
    """Threads on which it computes."""

    @property
    def has_small_kernels(self) -> bool:
        """Whether it multiplies small matrices without packing them first."""
        return self.kernels in {WIDE_KERNELS, "Cooperlake", "SapphireRapids"}

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.version}, {self.kernels}, {threads}, from {self.path}"

    def compute_on_callers(self) -> None:
        """Computes each product on the thread that asks for it, from now on.

        Threads of ours then compute side by side. The library would let them wait for each other.
        """
        ctypes.CDLL(self.path).openblas_set_num_threads(1)


class BlasError(Exception):
    """The library cannot do mlx's products. The message says why."""


def load(environment: Mapping[str, str] | None = None, *, is_global: bool = True) -> Blas | None:
    """Loads the fastest BLAS there is, so that mlx uses it. Call it before mlx is imported.

    Args:
        environment: where the settings are. None is that of this process.
        is_global: whether mlx is to see it. False only looks which one it would be.

    Returns:
        What was loaded. None where it is switched off, not needed or not there: mlx then uses its own.
    """
    environment = os.environ if environment is None else environment
    wanted = environment.get(LIBRARY_VARIABLE) or AUTO
    if wanted == OFF or sys.platform != "linux":
        return None
    threads = _thread_count(environment)
    for path in candidates() if wanted == AUTO else [wanted]:
        try:
            return _load(path, threads, is_global=is_global)
        except (OSError, BlasError):
            continue  # slow is better than nothing, and `forebay doctor` says that it is slow
    return None


def candidates() -> Iterator[str]:
    """Finds libraries that may do, the best first."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec is not None else ():
        yield from sorted(map(str, Path(place, "lib").glob("libopenblas*.so")))
    yield from SYSTEM


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns how many cores this process may use, at least one.

    Args:
        quota: where a container's limit stands.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
        cores = min(cores, -(-int(limit) // int(period)))
    except (OSError, ValueError):  # there is no limit
        pass
    return max(cores, 1)


def best_kernels(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Returns the kernels that OpenBLAS should use, or None if that is its own choice.

    Args:
        cpuinfo: where the processor's abilities stand.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return WIDE_KERNELS if set(flags.split()) >= WIDE else None


def _thread_count(environment: Mapping[str, str]) -> int:
    """Returns how many threads are to compute.

    One core stays free for whoever else there is, the event loop to begin with: the threads wait for each
    other in a loop, and if one of them has no core, all burn theirs.
    """
    for variable in (THREADS_VARIABLE, _NUM_THREADS):
        value = environment.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return max(usable_cores() - 1, 1)


def _load(path: str, threads: int, *, is_global: bool) -> Blas:
    wanted = {_NUM_THREADS: str(threads)}
    kernels = best_kernels()
    if kernels is not None and not os.environ.get(_CORETYPE):
        wanted[_CORETYPE] = kernels
    with _variables(wanted):
        library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
        config = _text(library, "openblas_get_config")
        if not hasattr(library, "cblas_sgemm"):
            raise BlasError(f"{path} has no cblas_sgemm")
        if "USE64BITINT" in config.split():
            raise BlasError(f"{path} takes 64-bit integers, and mlx passes 32-bit ones")
        if is_global:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # the same library again, now seen by all
    library.openblas_set_num_threads(threads)
    return Blas(
        path=path,
        version=" ".join(config.split()[:2]),
        kernels=_text(library, "openblas_get_corename"),
        threads=int(library.openblas_get_num_threads()),
    )


def _text(library: ctypes.CDLL, function: str) -> str:
    try:
        call = library[function]
    except AttributeError as error:
        raise BlasError(f"{library._name} is no OpenBLAS") from error  # noqa: SLF001  # ctypes has no other name
    call.restype = ctypes.c_char_p
    return bytes(call()).decode(errors="replace")


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that a library reads when it is loaded. Others, such as numpy's, read the same names."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
