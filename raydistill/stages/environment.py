"""What a result was made with: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("raydistill", "ray", "torch", "deepspeed", "transformers", "pyarrow")


def environment() -> dict[str, str]:
    """Versions and machine by name, as a report shows them."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "processor": device_name(),
        "cpus": str(os.cpu_count()),
    }


def device_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "an unnamed processor"
