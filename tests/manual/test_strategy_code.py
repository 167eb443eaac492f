"""A page's runs name the strategies' code that they were made with."""

import ast

from benchmarks.accuracy.papers import PAPERS
from benchmarks.accuracy.strategy_code import code_of, strategy_digest


def test_code_is_the_same_whatever_its_comments_say_and_another_with_another_constant() -> None:
    first, second, other = (code_of(ast.parse(f'def f():\n    """{d}"""\n    return {v}  # {d}')) for d, v in (
        ("Old.", 1), ("New.", 1), ("Old.", 2)))  # fmt: skip
    assert first == second != other


def test_every_row_of_the_papers_has_a_digest_of_its_own_strategy() -> None:
    digests = {m.strategy: strategy_digest(m.strategy) for p in PAPERS for m in p.methods}
    assert len(set(digests.values())) > len(digests) / 2  # those of one module share theirs
    assert digests["subflot"] != digests["benchmarks.accuracy.compositions:sliced_subflot"]
    assert strategy_digest("scaffold") == strategy_digest("fedprune.strategies.methods.drift")  # a partial preset
