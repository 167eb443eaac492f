"""The process of amqtt: a broker on one TCP port, without access control for clients and topics."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import warnings


def main() -> None:
    """Run until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bind")
    parser.add_argument("--tls", nargs=3, metavar=("CERTIFICATE", "KEY", "AUTHORITY"))
    arguments = parser.parse_args()
    listener: dict[str, object] = {"type": "tcp", "bind": arguments.bind}
    if arguments.tls is not None:
        certificate, key, authority = arguments.tls
        listener |= {"ssl": True, "certfile": certificate, "keyfile": key, "cafile": authority}
    # amqtt logs every client that disconnects; real problems show up in the clients.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        asyncio.run(_serve(listener))
    except Exception as error:  # noqa: BLE001 - the parent must learn why, whatever it was
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sys.exit(str(cause) or type(cause).__name__)


async def _serve(listener: dict[str, object]) -> None:
    from amqtt.broker import Broker

    anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    await Broker({"listeners": {"default": listener}, "plugins": anonymous}).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
