"""Makes the stack frames of a crash report: of fedprune's code with module, line and function, of other code only with
the package.
"""

from __future__ import annotations

import re
import traceback
from types import TracebackType
from typing import Any

from fedprune.wire.fleet_messages import MAX_FRAMES
from fedprune_device.privacy.redaction import module_of, module_of_file, redact

_FRAME = re.compile(r'^  File "([^"\n]{1,4096})", line ([0-9]{1,9}) in ([^\n]{1,128})$')


def exception_frames(trace: TracebackType | None) -> list[dict[str, Any]]:
    """The innermost frames of an exception, by module and line."""
    rows = []
    for frame, line in traceback.walk_tb(trace):
        module = module_of(str(frame.f_globals.get("__name__", "")))
        ours = module.startswith("fedprune")
        line, function = (line, frame.f_code.co_name[:128]) if ours else (0, "")
        rows.append({"module": module, "line": line, "function": function})
    return rows[::-1][:MAX_FRAMES]


def fault_frames(fault: str) -> list[dict[str, Any]]:
    """The frames of the thread in which a fault happened, of what faulthandler wrote."""
    rows: list[dict[str, Any]] = []
    current = False
    for text in fault.splitlines():
        if text.startswith(("Current thread", "Stack (most recent call first)")):
            current = True
        elif current and (frame := _FRAME.match(text)):
            module = module_of_file(frame[1])
            ours = module.startswith("fedprune")
            function = redact(frame[3], 128) if ours else ""
            rows.append({"module": module, "line": int(frame[2]) if ours else 0, "function": function})
        elif current and not text.startswith("  "):
            break
    return rows[:MAX_FRAMES]
