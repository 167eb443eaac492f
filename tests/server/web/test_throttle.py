"""Guessing is slow; who knows the password isn't kept from it by those who guess, nor by having logged in often."""

from pathlib import Path

from fedprune_server.web.auth.throttle import ACCOUNT, ADDRESS, FAILURE_LIFETIME_S, LOGIN_LIFETIME_S, PAIR, Throttle
from fedprune_server.web.database import ConsoleDatabase

HERE, THERE = "192.0.2.1", "2001:db8::1"


class Watch:
    def __init__(self, folder: Path) -> None:
        self.now = 1e9
        self.database = ConsoleDatabase(folder / "console.db")
        self.throttle = Throttle(self.database, lambda: self.now)

    def fail(self, times: int, account: str = "ann", address: str = HERE) -> None:
        for _ in range(times):
            self.throttle.count_failure(account, address)

    def wait(self, account: str = "ann", address: str = HERE) -> float:
        return self.throttle.wait_s(account, address)

    def log_in(self, account: str = "ann", address: str = HERE) -> None:
        self.throttle.count_failure(account, address)  # as the application does, before it knows
        self.throttle.reset(account, address)


def test_each_failure_beyond_the_free_ones_doubles_the_wait(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.fail(PAIR.free_failures - 1)
    waits = []
    for _ in range(12):
        watch.fail(1)
        waits.append(watch.wait())
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == PAIR.max_wait_s
    watch.now += FAILURE_LIFETIME_S + 1
    assert watch.wait() == 0


def test_logging_in_again_and_again_is_no_failure(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for _ in range(10 * ACCOUNT.free_failures):
        watch.log_in()
        watch.now += 60
        assert (watch.wait(), watch.wait("ben"), watch.wait("ann", THERE)) == (0, 0, 0)


def test_who_logs_in_takes_back_no_failure_in_other_names(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for n in range(ADDRESS.free_failures):
        watch.fail(1, f"guess-{n}")
        watch.log_in("mallory")
    assert watch.wait("ben") > 0


def test_an_operator_is_not_locked_out_by_those_who_guess_from_elsewhere(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.log_in()
    for n in range(ACCOUNT.free_failures + 20):
        watch.fail(1, "ann", f"198.51.100.{n}")
    assert watch.wait("ann", "203.0.113.9") == ACCOUNT.max_wait_s
    assert watch.wait() == 0
    watch.fail(PAIR.free_failures)
    assert watch.wait() > 0  # a guess from there is one
    watch.log_in()
    watch.now += LOGIN_LIFETIME_S
    for n in range(ACCOUNT.free_failures):
        watch.fail(1, "ann", f"198.51.100.{n}")
    assert watch.wait() > 0


def test_a_restart_forgets_no_failure(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.fail(PAIR.free_failures + 3)
    expected = watch.wait()
    watch.database.close()
    restarted = Watch(tmp_path)
    assert restarted.wait() == expected > 0
    restarted.log_in()
    restarted.database.close()
    assert Watch(tmp_path).wait() == 0
