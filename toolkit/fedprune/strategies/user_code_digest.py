"""Digest of a user's strategy: it changes if a file changes that the strategy uses."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from fedprune.jobs.job import Job
from fedprune.strategies.strategy_guards import is_shipped
from fedprune.strategies.user_strategies import compose_unchecked

# Installed packages have versions, so that their files needn't be digested.
_INSTALL_FOLDERS = {"site-packages", "dist-packages"}


def user_code_digest(job: Job) -> str:
    """Digest of the files that define a user's own strategy, with the user's modules that they import; empty for
    presets. Raises `ConfigError` as `user_strategy`."""
    if ":" not in job.strategy:
        return ""
    strategy, _ = compose_unchecked(job)
    parts_of_strategy = (strategy, strategy.aggregator, strategy.allocator)
    names = {type(instance).__module__ for instance in parts_of_strategy if instance is not None}
    names.add(job.strategy.partition(":")[0])
    digest = hashlib.sha256()
    for file in sorted(_user_files(names)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _user_files(names: Collection[str]) -> set[Path]:
    """Files of a user's modules, and of those in the same package or folder that they import, and so on."""
    pending = [n for n in names if not is_shipped(n) and n in sys.modules]
    packages = {n.partition(".")[0] for n in pending}
    folders = {Path(file).resolve().parent for n in pending if (file := sys.modules[n].__file__) is not None}
    visited, files = set(pending), set[Path]()
    while pending:
        module = sys.modules.get(pending.pop())
        file = getattr(module, "__file__", None)
        # Built-in and namespace modules have no file whose digest could change.
        if module is None or file is None:
            continue
        path = Path(file).resolve()
        # A virtual environment may be in the user's folder; what is installed there has versions instead of digests.
        is_user_file = not folders.isdisjoint(path.parents) and _INSTALL_FOLDERS.isdisjoint(path.parts)
        if not is_user_file and module.__name__.partition(".")[0] not in packages:
            continue
        files.add(path)
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name not in visited and not is_shipped(name):
                visited.add(name)
                pending.append(name)
    return files
