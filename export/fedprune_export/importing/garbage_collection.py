"""Pauses Python's garbage collector while torch is imported and a module is exported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Pause the collector of reference cycles.

    torch, timm and torch's exporter make a million objects that stay. The collector looks through all of them again
    and again as they grow, for a fifth of the import's time, and frees only some tens of megabytes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Moves all objects to the oldest generation at once; else the next collections would look through them. What
        # others have frozen would be thawed with them.
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()
        gc.enable()
