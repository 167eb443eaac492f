import secrets
from pathlib import Path

import pytest

from fedprune.security.certificates import PIN_BYTES
from fedprune.security.join_claim import JoinClaim
from fedprune_device.network.enrollment import read_claim_file

pytestmark = pytest.mark.board


@pytest.mark.parametrize("encoding", ["ascii", "utf-8-sig", "utf-16"])
def test_a_claim_is_read_as_editors_and_shells_save_it(tmp_path: Path, encoding: str) -> None:
    claim = JoinClaim.make(secrets.token_bytes(PIN_BYTES))
    (tmp_path / "claim").write_bytes(f"{claim.text}\r\n".encode(encoding))
    assert read_claim_file(tmp_path / "claim", "attic") == claim
