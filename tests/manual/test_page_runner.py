"""Who follows a page sees what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes.page_runner import Reader


def follow(tmp_path: Path, page: str, **replaced: str) -> Reader:
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "here").mkdir()
    with Reader(tmp_path / "here", replaced, 10) as reader:
        reader.follow(tmp_path / "page.md")
    return reader


def test_blocks_run_in_order_and_the_next_one_knows_where_the_last_one_was(tmp_path: Path) -> None:
    page = (
        "```sh\nmkdir a && cd a\nexport B=1\n```\ntext\n```sh\necho $B > c\n```\n    not run\n```python\nnot run\n```\n"
    )
    reader = follow(tmp_path, page)
    assert (reader.folder / "a" / "c").read_text() == "1\n"


@pytest.mark.parametrize("shown", ["one\nthree", "one ... three\nfour", "two\none two three", "One two three"])
def test_what_is_shown_must_come_in_its_order(tmp_path: Path, shown: str) -> None:
    page = "```sh\necho one two three; echo two; echo four five\n```\n\n```text\n{}\n```\n"
    follow(tmp_path, page.format("one ... three\n...\nfour ..."))
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError, match="the page shows"):
        follow(tmp_path / "again", page.format(shown))


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ended with 3:\nalas"):
        follow(tmp_path, "```sh\necho alas; (exit 3)\ntouch never\n```\n")
    assert not (tmp_path / "here" / "never").exists()
