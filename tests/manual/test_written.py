"""What is made from the code is what lies in docs/, and says all that the code has."""

from manual import written
from support.paths import ROOT


def test_docs_say_what_the_code_says() -> None:
    assert written.stale(ROOT) == [], "run `python -m manual`"
