"""What this process uses: memory, CPU time, descriptors. From /proc; what the system does not tell is left out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from grid.stats import Metric

METRICS: Final = (
    Metric("process_memory_bytes", "gauge", "Memory of this process.", "of"),
    Metric("process_cpu_seconds", "counter", "CPU time of this process, user and system."),
    Metric("process_descriptors", "gauge", "Files, sockets and the like that this process has open."),
    Metric("process_uptime_seconds", "gauge", "Seconds since statistics began."),
)
_STATUS: Final = Path("/proc/self/status")
_LINE: Final = re.compile(r"^(Vm\w+):\s+(\d+) kB$", re.MULTILINE)


def memory_usage() -> dict[str, int]:
    """Bytes by the kernel's names: VmPeak, VmSize, VmData, VmRSS, …; empty where there is no /proc."""
    try:
        status = _STATUS.read_text()
    except OSError:
        return {}
    return {name: int(count) << 10 for name, count in _LINE.findall(status)}


class ProcessStats:
    """IStatsProducer."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def get_stats(self) -> Mapping[str, float]:
        memory = memory_usage()
        told: dict[str, float] = {
            "process_cpu_seconds": time.process_time(),
            "process_uptime_seconds": time.monotonic() - self._began,
        }
        for shown, name in (("resident", "VmRSS"), ("virtual", "VmSize"), ("peak", "VmHWM")):
            if name in memory:
                told[f"process_memory_bytes.{shown}"] = memory[name]
        with suppress(OSError):
            told["process_descriptors"] = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a count, quickly
        return told
