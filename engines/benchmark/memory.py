"""Peak resident memory of this process, resettable where the system can."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): 'reset the peak resident set size to the current value'


class PeakMemory:
    """Linux: VmHWM, set back by `reset`. Elsewhere the peak of the whole process so far."""

    def reset(self) -> None:
        """Start a new peak at the memory held now."""
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            return  # not Linux, or a sandbox without the file: peaks then only grow

    def peak(self) -> int:
        """Bytes of resident memory, the highest since the last `reset`."""
        try:
            lines = _STATUS.read_text(encoding="ascii").splitlines()
        except OSError:
            return _peak_of_process()
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return _peak_of_process()


def _peak_of_process() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
