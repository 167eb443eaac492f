"""Who follows a page sees what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes.page_runner import Reader, steps


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


def test_what_cannot_run_is_left_out_and_counted(tmp_path: Path) -> None:
    page = (
        "<!-- run: not here, it needs root -->\n```sh\nfalse\n```\n<!-- run: once installed -->\n```sh\nfalse\n```\n"
        "```sh\necho 7\n```\n<!-- output: an example -->\n```text\n8\n```\n"
    )
    assert follow(tmp_path, page).left_out == 1
    assert [step.examples for step in steps(tmp_path / "page.md")] == [0, 0, 1]


def test_what_stays_in_a_terminal_is_waited_for_or_ended(tmp_path: Path) -> None:
    page = '<!-- run: in {}, until "ready" -->\n```sh\necho ready; {}\n```\n'
    waits = "<!-- run: wait for first -->\n```sh\ntest -e done\n```\n"
    reader = follow(tmp_path, page.format("first", "sleep 0.3; touch done") + page.format("second", "sleep 60") + waits)
    assert [p.returncode for p in reader.terminals.values()] == [0, -9]


def test_what_never_gets_ready_or_ends_badly_is_told(tmp_path: Path) -> None:
    page = '<!-- run: in server, until "ready" -->\n```sh\necho {}; exit 4\n```\n<!-- run: wait for server -->\n'
    with pytest.raises(AssertionError, match="server never said 'ready'"):
        follow(tmp_path, page.format("alas"))
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError, match=r"(ended with 4|never said)"):
        follow(tmp_path / "again", page.format("ready"))


def test_words_of_the_page_are_replaced_whole(tmp_path: Path) -> None:
    page = "```sh\necho :8883/ 18883 > ports\n```\n"
    assert (follow(tmp_path, page, **{"8883": "8884", "8884": "1"}).folder / "ports").read_text() == ":8884/ 18883\n"
