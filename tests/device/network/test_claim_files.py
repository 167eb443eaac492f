import os
import secrets
from pathlib import Path

import pytest

from fedprune.core.errors import IdentityError
from fedprune.security.certificates import PIN_BYTES
from fedprune.security.join_claim import JoinClaim
from fedprune_device.network.enrollment import read_claim_file

pytestmark = pytest.mark.board


@pytest.mark.parametrize("encoding", ["ascii", "utf-8-sig", "utf-16"])
def test_a_claim_is_read_as_editors_and_shells_save_it(tmp_path: Path, encoding: str) -> None:
    claim = JoinClaim.make(secrets.token_bytes(PIN_BYTES))
    (tmp_path / "claim").write_bytes(f"{claim.text}\r\n".encode(encoding))
    assert read_claim_file(tmp_path / "claim", "attic") == claim


def test_a_pipe_is_no_claim_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "claim")
    with pytest.raises(IdentityError, match="not a regular file"):
        read_claim_file(tmp_path / "claim", "attic")
