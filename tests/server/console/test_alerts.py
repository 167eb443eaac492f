"""The book of alerts: what mutes nothing worse, and doesn't grow."""

from __future__ import annotations

from fedprune_server.console.alerts import MOST, AlertBook


def test_strangers_that_wait_hide_nothing_worse() -> None:
    book = AlertBook()
    for i in range(MOST + 9):
        book.raised("waiting", "waits to be let in", 1.0, device=f"d{i}")
    book.raised("broker", "there is no connection", 2.0)
    assert (book.counts()["waiting", "info"], book.counts()["broker", "critical"]) == (MOST, 1)
    book.only("waiting", [], 3.0)
    book.raised("waiting", "waits to be let in", 4.0, device="late")
    assert [a.device for a in book.standing if a.alert == "waiting"] == ["late"]


def test_news_that_nobody_asks_for_do_not_pile_up() -> None:
    book = AlertBook()
    for i in range(9 * MOST):
        book.raised("broker", "there is no connection", float(i))
        book.over("broker", float(i))
    news = book.news()
    assert len(news) <= 4 * MOST
    assert news[-1].gone_at == 9.0 * MOST - 1
    assert not book.news()
