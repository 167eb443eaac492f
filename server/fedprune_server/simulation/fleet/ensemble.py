"""Several pieces of work side by side, whose computations are done together whenever all of them wait for one.

Each piece runs in a thread of its own, written as if it were alone; where it needs something computed it asks and
waits. As soon as every piece that is still at work has asked, all requests are answered at once. Which requests meet
depends on the pieces alone and not on how fast their threads are, so the same pieces give the same answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class _Member(Generic[Result]):
    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.request: Any = None
        self.answer: Any = None
        self.result: Result | None = None
        self.error: Exception | None = None
        self.done = False


class Ensemble(Generic[Result]):
    """Pieces of work that are done together.

    Args:
        answer: Takes the requests of all pieces that wait, in the pieces' order, and returns their answers; an answer
            that is an exception is raised where the request was made.
    """

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]]) -> None:
        self._answer = answer
        self._arrived = threading.Semaphore(0)
        self._own = threading.local()

    def ask(self, request: Any) -> Any:
        """Have something computed; called by a piece of work.

        Args:
            request: What to compute.
        """
        member: _Member[Result] = self._own.member
        member.request = request
        self._arrived.release()
        member.go.acquire()
        answer, member.answer = member.answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, pieces: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
        """Do all pieces to their ends.

        Returns:
            What each piece returned, or the exception that ended it.
        """
        members: list[_Member[Result]] = [_Member() for _ in pieces]
        threads = [
            threading.Thread(target=self._work, args=(member, piece), daemon=True)
            for member, piece in zip(members, pieces, strict=True)
        ]
        for thread in threads:
            thread.start()
        active = members
        while active:
            for _ in active:
                self._arrived.acquire()
            active = [m for m in active if not m.done]
            if active:
                self._serve(active)
        for thread in threads:
            thread.join()
        return [m.error if m.error is not None else m.result for m in members]  # type: ignore[misc]

    def _serve(self, members: Sequence[_Member[Result]]) -> None:
        try:
            answers = self._answer([m.request for m in members])
        except Exception as error:  # noqa: BLE001 - it is raised again in every piece that waits for an answer
            answers = [error] * len(members)
        for member, answer in zip(members, answers, strict=True):
            member.request, member.answer = None, answer
            member.go.release()

    def _work(self, member: _Member[Result], piece: Callable[[], Result]) -> None:
        self._own.member = member
        try:
            member.result = piece()
        except Exception as error:  # noqa: BLE001 - it is handed to whoever wants the result
            member.error = error
        finally:
            member.done = True
            self._arrived.release()
