"""The machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["processor"]


@cache
def processor() -> str:
    """Return the name of the processor, or its architecture where the system gives no name, and the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{model}, {os.cpu_count()} cores"
