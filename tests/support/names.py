"""What names and comments tell a reader, as counts with limits: `make check` calls it.

    python tests/support/names.py    names each place that breaks a limit, and says what to do

It reads syntax trees, so that strings and texts don't count. A limit holds for a whole tree, not for a file: a few
names that look like fillers are the field's own.
"""

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Participles that don't end in -ed: a function of such a name tells neither what it does nor what it returns.
_IRREGULAR = frozenset({
    "begun", "bought", "broken", "brought", "built", "caught", "chosen", "dealt", "done", "drawn", "driven", "fed",
    "felt", "foreseen", "foretold", "found", "given", "gone", "grown", "heard", "held", "hidden", "kept", "known",
    "laid", "led", "left", "lent", "lost", "made", "meant", "met", "overheard", "paid", "said", "seen", "sent",
    "shown", "spent", "spoken", "stood", "sworn", "taken", "thought", "told", "torn", "understood", "undone", "woken",
    "won", "worn", "written",
})  # fmt: skip

# Words that look like participles, or are, and are terms of the field, adjectives or verbs as well.
_TERMS = frozenset({
    "based", "batched", "bounded", "embed", "embedded", "exceed", "fixed", "grouped", "indeed", "masked", "needed",
    "nested", "quantised", "quantized", "shared", "signed", "speed", "unused", "weighted",
})  # fmt: skip

# What a variable is called that is named after what happened to it, or after its place beside others.
_FILLERS = frozenset({
    "again", "came", "found", "given", "held", "kept", "known", "least", "made", "more", "most", "moved", "much",
    "other", "others", "own", "part", "parts", "places", "said", "seen", "shown", "standing", "taken", "told",
    "wanted", "way", "ways", "whole",
})  # fmt: skip

# The worst files are enough to begin with: most of a tree has fewer comments than its mean.
_MAX_BARE_FILES = 20


@dataclass(frozen=True)
class Limits:
    """What a tree may have; None where nothing is asked of it."""

    participle_percent: float
    fillers_per_1000: float
    shared_names: int | None = None
    min_comments_per_1000: float | None = None


PRODUCT = Limits(1, 2.5, shared_names=60, min_comments_per_1000=25)
TESTS = Limits(2, 5)

# Each tree with its folders.
TREES = (("the product", ("toolkit", "export", "device_runtime", "server"), PRODUCT), ("the tests", ("tests",), TESTS))


@dataclass
class NameCounts:
    """Counts of a tree's names and comments, and where those stand that say nothing."""

    lines: int = 0
    functions: int = 0
    participles: list[str] = field(default_factory=list)
    fillers: list[str] = field(default_factory=list)
    definitions: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    comments: Counter[Path] = field(default_factory=Counter)
    lines_of: dict[Path, int] = field(default_factory=dict)

    @property
    def shared_names(self) -> dict[str, list[Path]]:
        """Public names that more than one room defines, with the files that define them: one name, several meanings."""
        return {n: files for n, files in self.definitions.items() if len({f.parent for f in files}) > 1}

    def per_1000_lines(self, count: int) -> float:
        return 1000 * count / max(1, self.lines)

    def missing_comments(self, file: Path) -> float:
        """How many comments a file would need for the tree's mean."""
        return self.lines_of[file] * self.comments.total() / max(1, self.lines) - self.comments[file]


def count_names(root: Path, folders: Iterable[str]) -> NameCounts:
    """Count what the Python files of some of a root's folders hold."""
    counts = NameCounts()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            _count_file(path.relative_to(root), path.read_text(encoding="utf-8"), counts)
    return counts


def breaches(tree: str, counts: NameCounts, limits: Limits) -> Iterator[str]:
    """A line for each limit that a tree breaks, with what to do, and one for each place that counts."""
    percent = 100 * len(counts.participles) / max(1, counts.functions)
    if percent > limits.participle_percent:
        allowed = f"{limits.participle_percent:g} % at most"
        yield f"{tree}: {percent:.1f} % of the functions are bare participles, expected {allowed}"
        yield "Call what acts by an imperative verb, and what returns something by a noun:"
        yield from counts.participles
    fillers = counts.per_1000_lines(len(counts.fillers))
    if fillers > limits.fillers_per_1000:
        allowed = f"{limits.fillers_per_1000:g} at most"
        yield f"{tree}: {fillers:.1f} variables per 1,000 lines are fillers, expected {allowed}"
        yield "Name a variable after the thing that it holds, not after what happened to it:"
        yield from counts.fillers
    shared = counts.shared_names
    if limits.shared_names is not None and len(shared) > limits.shared_names:
        yield f"{tree}: {len(shared)} public names stand in two or more rooms, expected {limits.shared_names} at most"
        yield "Name each after its subject:"
        yield from (f"  {name}: {', '.join(map(str, files))}" for name, files in sorted(shared.items()))
    comments = counts.per_1000_lines(counts.comments.total())
    if limits.min_comments_per_1000 is not None and comments < limits.min_comments_per_1000:
        yield f"{tree}: {comments:.1f} comments per 1,000 lines, expected {limits.min_comments_per_1000:g} at least"
        yield "Say beside a limit, an order or a quirk why it is so. The longest files with the fewest comments:"
        for file in sorted(counts.lines_of, key=counts.missing_comments, reverse=True)[:_MAX_BARE_FILES]:
            yield f"  {file}: {counts.comments[file]} in {counts.lines_of[file]} lines"


def _count_file(path: Path, text: str, counts: NameCounts) -> None:
    tree = ast.parse(text)
    counts.lines_of[path] = text.count("\n")
    counts.lines += counts.lines_of[path]
    counts.comments[path] = sum(map(_is_comment, tokenize.generate_tokens(io.StringIO(text).readline)))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            counts.definitions[node.name].append(path)
    for inner in ast.walk(tree):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            counts.functions += 1
            if is_bare_participle(inner):
                counts.participles.append(f"  {path}:{inner.lineno}: {inner.name}")
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            _count_variable(inner.id, f"  {path}:{inner.lineno}: {inner.id}", counts)
        elif isinstance(inner, ast.arg):
            _count_variable(inner.arg, f"  {path}:{inner.lineno}: {inner.arg}", counts)


def _count_variable(name: str, place: str, counts: NameCounts) -> None:
    if name.strip("_").lower() in _FILLERS:
        counts.fillers.append(place)


def is_bare_participle(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function's name is nothing but participles. Properties may be, and what answers yes or no."""
    words = [word for word in function.name.split("_") if word]
    if any("property" in ast.unparse(decorator) for decorator in function.decorator_list):
        return False
    if function.returns is not None and ast.unparse(function.returns) == "bool":
        return False
    return bool(words) and all(map(_is_participle, words))


def _is_participle(word: str) -> bool:
    # What ends in -ed and is this short is a noun or a verb: need, seed.
    return word not in _TERMS and (word in _IRREGULAR or (len(word) > 4 and word.endswith("ed")))


def _is_comment(token: tokenize.TokenInfo) -> bool:
    # What is written for ruff and mypy gives a reader no reason.
    return token.type == tokenize.COMMENT and "noqa" not in token.string and "type: ignore" not in token.string


def main() -> int:
    lines = [line for tree, folders, limits in TREES for line in breaches(tree, count_names(ROOT, folders), limits)]
    for line in lines:
        print(line)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
