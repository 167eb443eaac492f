"""Runs the commands of a page of docs/ as a reader would: in order, in a folder, in as many terminals as it opens.

A block fenced as `sh` is run; a block fenced as `text` behind it is what the command shows: its lines come in this
order, `...` stands for anything. What a reader needn't see stands in a comment right before the fence:

    <!-- run: in board, until "joined" -->    in a terminal of its own, where it stays; go on when it has said this
    <!-- run: as root -->                     only for root
    <!-- run: once installed -->              only where the page is followed from a bare clone; else it is done already
    <!-- run: not here, REASON -->            never: the test counts these
    <!-- run: wait for board, server -->      (no block) until what stays there has ended with 0
    <!-- output: an example -->               what is shown differs from run to run, and is not compared
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run|output): (?!wait for )(?P<said>[^\n]*?) -->\n)?```(?P<kind>sh|text)\n(?P<body>.*?)^```$"
    r"|^<!-- run: wait for (?P<names>.*?) -->$",
    re.MULTILINE | re.DOTALL,
)
_STAYS = re.compile(r'in (?P<name>\w+), until "(?P<text>.*)"')
_COMMANDS = ("device", "export", "flash", "server", "simulate")


@dataclass
class Step:
    """A block of a page, or a wait.

    Attributes:
        script: What is run; empty for a wait.
        how: What the comment says of it.
        shown: The output that the page shows, where it is compared.
        examples: Outputs that it shows and that are not compared.
        waits: Terminals whose end is waited for.
    """

    script: str = ""
    how: str = ""
    page_output: str = ""
    examples: int = 0
    waits: list[str] = field(default_factory=list)

    @property
    def never(self) -> bool:
        """Whether it can't run in a test."""
        return self.how.startswith("not here")


def steps(page: Path) -> list[Step]:
    """What a page asks its reader to do."""
    page_steps: list[Step] = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["names"]:
            page_steps.append(Step(waits=[name.strip() for name in match["names"].split(",")]))
        elif match["kind"] == "sh":
            page_steps.append(Step(match["body"], match["said"] or ""))
        elif match["mark"] == "output":
            page_steps[-1].examples += 1
        else:
            page_steps[-1].page_output = match["body"]
    return page_steps


class Reader:
    """Who follows a page. Use it as a context: what stays in terminals ends with it.

    Args:
        replaced: Words of the page that are others here, such as ports.
        bare: Whether it begins from a bare clone and installs; else the programs are those of this environment.
    """

    def __init__(self, folder: Path, replaced: Mapping[str, str], patience_s: float, *, bare: bool = False) -> None:
        self.folder = folder
        self.replaced = dict(replaced)
        self.patience_s = patience_s
        self.bare = bare
        self.terminals: dict[str, subprocess.Popen[bytes]] = {}
        self.left_out = 0
        self._place = folder / ".place"
        self._place.write_text(f"cd {shlex.quote(str(folder))}\n")
        self._environment = {k: v for k, v in os.environ.items() if not bare or k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if not bare:
            self._install()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.terminals.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def follow(self, page: Path) -> None:
        """Do all that a page says; an AssertionError says what fails, doesn't end, or shows something else."""
        for step in steps(page):
            for name in step.waits:
                self._wait(name)
            root = step.how == "as root" and os.geteuid() != 0
            if not step.script or step.never or root or (step.how == "once installed" and not self.bare):
                self.left_out += step.never
                continue
            output = self._run(step)
            missing = _missing(step.page_output, output)
            assert missing is None, f"the page shows {missing!r}, but\n{step.script}said\n{output}"

    def _run(self, step: Step) -> str:
        script = re.sub(r"\b\w+\b", lambda word: self.replaced.get(word[0], word[0]), step.script)
        stays = _STAYS.fullmatch(step.how)
        before = f"set -e; . {shlex.quote(str(self._place))}\n"
        if stays is None:
            after = f'\n{{ echo "cd $(printf %q "$PWD")"; export -p; }} > {shlex.quote(str(self._place))}'
            done = subprocess.run(
                ["bash", "-c", before + script + after],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self._environment, timeout=self.patience_s,
                check=False,
            )  # fmt: skip
            output = done.stdout.decode(errors="replace")
            assert done.returncode == 0, f"{script}ended with {done.returncode}:\n{output}\n{self._logs()}"
            return output
        name = stays["name"]
        with self._log(name).open("wb") as log:
            self.terminals[name] = subprocess.Popen(
                ["bash", "-c", before + script], stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        until = time.monotonic() + self.patience_s
        silent = False
        while stays["text"] not in self._log(name).read_text(errors="replace"):
            assert not silent, f"{name} never said {stays['text']!r}: {self._logs()}"
            time.sleep(0.05)
            # Looked at before its words are read once more: its last may be these.
            silent = self.terminals[name].poll() is not None or time.monotonic() > until
        return self._log(name).read_text(errors="replace")

    def _wait(self, name: str) -> None:
        try:
            code = self.terminals[name].wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} doesn't end: {self._logs()}") from None
        assert code == 0, f"{name} ended with {code}: {self._logs()}"

    def _install(self) -> None:
        """What `pip install` would have made, for the code that is tested."""
        programs = self.folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f"export PATH={shlex.quote(str(programs))}:$PATH\n")
        bodies = {"python": f'exec {shlex.quote(sys.executable)} "$@"'}
        for name in _COMMANDS:
            start = (
                f"import sys; sys.argv[0] = 'fedprune-{name}'; from fedprune_start import {name}; sys.exit({name}())"
            )
            bodies[f"fedprune-{name}"] = f'exec {shlex.quote(sys.executable)} -c "{start}" "$@"'
        for name, body in bodies.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)

    def _log(self, name: str) -> Path:
        return self.folder / f".{name}.log"

    def _logs(self) -> str:
        return "\n".join(f"--- {n}\n{self._log(n).read_text(errors='replace')[-2000:]}" for n in self.terminals)


def _missing(page_output: str, output: str) -> str | None:
    """The first line of what a page shows that doesn't come in the output, after those before it."""
    lines: Iterator[str] = iter(output.splitlines())
    for line in page_output.splitlines():
        pattern = re.compile(r"\s+".join(".*".join(map(re.escape, word.split("..."))) for word in line.split()))
        if line.strip() and not any(pattern.fullmatch(line_text.strip()) for line_text in lines):
            return line
    return None
