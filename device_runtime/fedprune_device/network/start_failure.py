"""Report to the server why a board that has taken part can't start any more, before its program ends with that error.

Without this report such a board would only be offline, and nobody would know, for example, that its samples can't be
read. The board connects, announces itself with the reason, and disconnects. The service manager starts the program
again later, which repeats the report until somebody mends the board.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedprune import __version__
from fedprune.core.errors import BrokerError, FedpruneError, IdentityError, JoinError
from fedprune.wire.messages import MAX_TROUBLE_LENGTH, Birth
from fedprune_device.network.membership import MembershipOptions, resolve_membership
from fedprune_device.privacy.policy import read_policy
from fedprune_device.privacy.redaction import redact, refusal_reason
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore

_LOG = logging.getLogger("fedprune.device")

_CONNECT_TIMEOUT_S, _SEND_TIMEOUT_S = 10.0, 5.0
# Errors of the connection to the server itself, which can't be reported over it.
_CONNECTION_ERRORS = (BrokerError, IdentityError, JoinError)


def report_start_failure(options: MembershipOptions, error: Exception, profile: str, policy: Path | None) -> None:
    """Send the reason to the server, if this board has taken part before and nothing else uses its state directory.

    `policy` is the file of the owner's privacy policy, which says whether the error's own words may leave the board.
    """
    owner = DirectoryOwner(options.device, options.site)
    if isinstance(error, _CONNECTION_ERRORS) or not owner.owns(options.state):
        return
    try:
        with DeviceStore(options.state, owner=owner) as store:
            member = resolve_membership(options)
            if member.identity is not None and not member.identity.has_joined:
                return
            text = redact(refusal_reason(error, private=_is_private(store, policy)), MAX_TROUBLE_LENGTH)
            connection = member.connect(store.next_session)
            connection.link.start(_CONNECT_TIMEOUT_S)
            try:
                birth = Birth(options.device, store.session, profile, 0, f"fedprune {__version__}", trouble=text)
                connection.send(birth)
                connection.link.flush(_SEND_TIMEOUT_S)
            finally:
                connection.link.close()
    except Exception as failure:  # noqa: BLE001 - whatever it is, the error that is reported is the one to end with
        _LOG.warning("the server couldn't be told why this board doesn't start: %s", failure)


def _is_private(store: DeviceStore, policy: Path | None) -> bool:
    try:
        store.apply_policy(read_policy(policy))
    except FedpruneError:  # a policy that can't be read may ask for anything
        return True
    return store.privacy.is_private
