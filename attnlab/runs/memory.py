"""Peak memory of this process, as the operating system counts it."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int | None:
    """The largest resident size of this process so far, in bytes; None where the system does not tell.

    Linux' own count comes first: `getrusage` starts a process at the peak of the one that started it.

    Example:
        >>> peak_memory() > 1_000_000
        True
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
