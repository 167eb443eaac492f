"""The page of all commands, from their parsers: docs/reference/cli.md."""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from fedprune.output.examples import examples_of
from fedprune_device.cli import main as device
from fedprune_export.cli import main as export
from fedprune_flash.cli import main as flash
from fedprune_server.cli import main as server
from fedprune_server.cli import simulate
from manual import setting_pages

_HEAD = """# Commands

<!-- Made by `python -m manual`: change the parsers instead. -->

What every command takes, as its `--help` says it; an option that several commands of a program take alike is explained
with the first of them, and a setting of a job or server on [their page](settings.md). All end with a
[documented exit code](../exit-codes.md).

## Completion

With the extra `completion`, Tab completes commands, options, their words and files. Write the script once, and again
after an update:

    fedprune completion bash >~/.fedprune-completion             # or zsh
    echo 'eval "$(<~/.fedprune-completion)"' >>~/.bashrc   # or, after compinit, ~/.zshrc
"""
_WORD = re.compile(r"[a-z]+(?:n't)?(?:[ ,;]|:(?: |$)|$)(?!\(default\))")
"""How help begins that can begin with a capital: not with a value, such as ray:auto, or one that is the default."""
_SETTINGS = frozenset(re.findall(r"\| `(--[a-z-]+)` \|", setting_pages.page()))
"""Options that the page of settings explains."""


def page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    shown: dict[str, str] = {}
    for prog, parser in _parsers():
        if prog.count(" ") == 0:  # options are repeated within a program, not from one to the next
            shown = {}
        parts.append(_command(prog, parser, "", 2, shown))
    return "\n".join(parts).rstrip() + "\n"


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield "fedprune-export", export.build_parser()
    for name, parser in export.command_parsers().items():
        yield f"fedprune-export {name}", parser
    yield "fedprune-server", server.build_parser()
    yield "fedprune-device", device.build_parser()
    yield "fedprune-flash", flash.build_parser()
    yield "fedprune-simulate", simulate.build_parser()
    for name, parser in simulate.command_parsers().items():
        yield f"fedprune-simulate {name}", parser


def _command(name: str, parser: argparse.ArgumentParser, what: str, level: int, shown: dict[str, str]) -> str:
    """A command and those within it; `shown` has the rows of tables so far, each with the command that has it."""
    text = f"{'#' * level} {name}\n\n{_sentence(parser.description or what)}{_usage(parser)}\n"
    text += f"\n{body}" if (body := _body(name, parser, shown)) else ""
    inner = [_command(f"{name} {n}", p, w, min(level + 1, 5), shown) for n, p, w in _commands(parser)]
    return "\n".join([text, *inner])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield name, inner, said.get(name, "")


def _body(name: str, parser: argparse.ArgumentParser, shown: dict[str, str]) -> str:
    """A command's examples and options; those that a command above explains alike are only named."""
    rows, elsewhere, settings = [], defaultdict[str, list[str]](list), []
    for action in filter(_shown, parser._actions):
        row = _row(parser, action)
        if name == "fedprune-server run" and max(action.option_strings, key=len) in _SETTINGS:
            settings.append(f"`{_invocation(parser, action)}`")
            shown[row] = name
        elif (above := shown.setdefault(row, name)) == name:
            rows.append(row)
        else:
            elsewhere[above].append(f"`{max(action.option_strings, key=len, default=_invocation(parser, action))}`")
    if settings:
        rows.append(f"- Settings of [the job and the server](settings.md): {', '.join(settings)}.")
    if elsewhere:
        sizes = Counter(shown.values())
        alike = (
            f"{'all' if sizes[above] == len(names) > 1 else ', '.join(names)} ([{above}](#{above.replace(' ', '-')}))"
            for above, names in elsewhere.items()
        )
        rows.append(f"- As above: {', '.join(alike)}.")
    examples = [] if any(_commands(parser)) else examples_of(parser.prog)
    parts = ["".join(f"    {line}\n" for line in examples), "".join(f"{row}\n" for row in rows)]
    return "\n".join(filter(None, parts))


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be said besides options, if anything: argparse's own usage is another from one Python to the next."""
    words = [parser.prog]
    either = {
        id(a): group for group in parser._mutually_exclusive_groups for a in group._group_actions if group.required
    }
    written: set[int] = set()
    for action in parser._actions:
        group = either.get(id(action))
        if isinstance(action, argparse._SubParsersAction):
            words.append(str(action.metavar or "COMMAND"))
        elif group is not None and id(group) not in written:
            written.add(id(group))
            words.append(f"({' | '.join(_invocation(parser, a) for a in group._group_actions)})")
        elif group is None and action.required:
            words.append(_invocation(parser, action))
        elif group is None and not action.option_strings:
            words.append(f"[{_invocation(parser, action).strip('[]')}]")
    return f" Usage: `{' '.join(words)}`." if len(words) > 1 else ""


def _invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An option's longest name, and what follows it; a positional's name."""
    names = [*action.option_strings]
    value = "" if action.nargs == 0 else _value(parser, action)
    return " ".join(part for part in (max(names, key=len, default=""), value) if part)


def _value(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    name = action.dest.upper() if action.option_strings else action.dest
    if action.choices and action.metavar is None:
        return "|".join(map(str, action.choices))
    return formatter._format_args(action, name)


def _shown(action: argparse.Action) -> bool:
    if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
        return False
    return not {"--help", "--version"} & set(action.option_strings)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    short = [f"`{name}`, " for name in action.option_strings if not name.startswith("--")]
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    choices = "" if not action.choices or action.metavar is None else f" One of {', '.join(map(str, action.choices))}."
    needed = " Required." if action.required and action.option_strings else ""
    name = "".join(short) + f"`{_invocation(parser, action)}`"
    return f"- {name}: {_sentence(text)}{choices}{needed}".removesuffix(": ")


def _sentence(text: str | None) -> str:
    """Help as a sentence, in which names with underscores and angle brackets stay as they are."""
    flat = " ".join((text or "").split())
    flat = flat.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") if "`" not in flat else flat
    begun = flat[:1].upper() + flat[1:] if _WORD.match(flat) else flat
    return begun if not begun or begun.endswith((".", "!", "?")) else f"{begun}."
