"""What machines of many kinds say of themselves, put together from what their maker publishes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from forebay.mlx_service.machine import GIB, Readings


@dataclass(frozen=True)
class Mac:
    """A Mac as it is sold."""

    chip: str
    model: str
    memory: int
    """In GiB."""
    cores: tuple[int, int]
    """Performance and efficiency cores."""
    gpu: int
    system: str
    bandwidth: int
    """In GB/s."""
    metal: float
    """GiB that Metal was seen to recommend on machines of that size."""
    profile: str


MACS = (
    Mac("Apple M1", "MacBookAir10,1", 8, (4, 4), 7, "14.6.1", 68, 5.333, "apple-small"),
    Mac("Apple M1", "Macmini9,1", 16, (4, 4), 8, "13.6", 68, 10.667, "apple-base"),
    Mac("Apple M1 Pro", "MacBookPro18,3", 16, (6, 2), 14, "14.7", 200, 10.667, "apple-pro"),
    Mac("Apple M1 Pro", "MacBookPro18,1", 32, (8, 2), 16, "15.3", 200, 21.333, "apple-pro"),
    Mac("Apple M1 Max", "Mac13,1", 64, (8, 2), 32, "15.1", 400, 48, "apple-max"),
    Mac("Apple M1 Ultra", "Mac13,2", 128, (16, 4), 64, "15.5", 800, 96, "apple-ultra"),
    Mac("Apple M2", "Mac14,2", 8, (4, 4), 8, "14.4", 100, 5.333, "apple-small"),
    Mac("Apple M2", "Mac14,2", 24, (4, 4), 10, "15.2", 100, 16, "apple-base"),
    Mac("Apple M2 Pro", "Mac14,12", 32, (8, 4), 19, "14.5", 200, 21.333, "apple-pro"),
    Mac("Apple M2 Max", "Mac14,5", 96, (8, 4), 38, "15.6", 400, 72, "apple-max"),
    Mac("Apple M2 Ultra", "Mac14,14", 192, (16, 8), 76, "14.2.1", 800, 144, "apple-ultra"),
    Mac("Apple M3", "Mac15,12", 16, (4, 4), 10, "15.0", 100, 10.667, "apple-base"),
    Mac("Apple M3 Pro", "Mac15,6", 18, (5, 6), 14, "14.3", 150, 12, "apple-pro"),
    Mac("Apple M3 Pro", "Mac15,7", 36, (6, 6), 18, "15.4", 150, 27, "apple-pro"),
    Mac("Apple M3 Max", "Mac15,10", 36, (10, 4), 30, "14.6", 300, 27, "apple-max"),
    Mac("Apple M3 Max", "Mac15,9", 128, (12, 4), 40, "15.5", 400, 96, "apple-max"),
    Mac("Apple M3 Ultra", "Mac15,14", 512, (24, 8), 80, "15.6.1", 819, 384, "apple-ultra"),
    Mac("Apple M4", "Mac16,10", 16, (4, 6), 10, "15.1", 120, 10.667, "apple-base"),
    Mac("Apple M4 Pro", "Mac16,11", 64, (10, 4), 20, "15.5", 273, 48, "apple-pro"),
    Mac("Apple M4 Max", "Mac16,6", 36, (10, 4), 32, "15.6", 410, 27, "apple-max"),
    Mac("Apple M4 Max", "Mac16,5", 128, (12, 4), 40, "26.0", 546, 96, "apple-max"),
    Mac("Apple M5", "Mac17,2", 32, (4, 6), 10, "26.2", 153, 21.333, "apple-base"),
    Mac("Apple M5 Pro", "Mac17,9", 48, (6, 12), 20, "26.3", 307, 36, "apple-pro"),
    Mac("Apple M5 Max", "Mac17,6", 128, (6, 12), 40, "26.3", 614, 96, "apple-max"),
    Mac("Apple A18 Pro", "Mac17,5", 8, (2, 4), 5, "26.3", 60, 5.333, "apple-small"),
)


def name(mac: Mac) -> str:
    """Returns a Mac in a few words."""
    return f"{mac.chip} {mac.gpu} cores {mac.memory} GiB"


def readings(mac: Mac, **changes: str | None) -> Readings:
    """Returns what a Mac says. A change replaces a line of sysctl, dots written `__`; None leaves it out.

    `profiler` and `sw_vers` replace the whole answer of these programs.
    """
    lines: dict[str, str | None] = {
        "machdep.cpu.brand_string": mac.chip,
        "hw.model": mac.model,
        "hw.memsize": str(mac.memory * GIB),
        "hw.perflevel0.physicalcpu": str(mac.cores[0]),
        "hw.perflevel1.physicalcpu": str(mac.cores[1]),
        "iogpu.wired_limit_mb": "0",
        "sysctl.proc_translated": "0",
        "kern.osproductversion": mac.system,
    }
    display = {
        "_name": mac.chip,
        "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
        "spdisplays_vendor": "sppci_vendor_Apple",
        "sppci_bus": "spdisplays_builtin",
        "sppci_cores": str(mac.gpu),
        "sppci_device_type": "spdisplays_gpu",
        "sppci_model": mac.chip,
    }
    profiler = changes.pop("profiler", json.dumps({"SPDisplaysDataType": [display]}))
    sw_vers = changes.pop(
        "sw_vers", f"ProductName:\t\tmacOS\nProductVersion:\t\t{mac.system}\nBuildVersion:\t\t24A1\n"
    )
    lines.update({key.replace("__", "."): value for key, value in changes.items()})
    return Readings(
        system="darwin",
        architecture="arm64",
        sysctl="".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None),
        sw_vers=sw_vers or "",
        profiler=profiler or "",
        memory_bytes=mac.memory * GIB,
        core_count=sum(mac.cores),
    )
