"""Presigned addresses of a bucket's objects: AWS Signature Version 4 in the query.

botocore makes the same ones in three times as long: it works out the endpoint, checks parameters and parses the address
again each time. A server signs an address or two for each update.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

_ALGORITHM = "AWS4-HMAC-SHA256"


def presigned(
    method: str, url: str, headers: Mapping[str, str], credentials: Any, region: str, seconds: int, now: datetime
) -> str:
    """An address with its signature, which is valid for `seconds`.

    Args:
        url: The object's, without a query.
        headers: What the request has to send unchanged, in addition to `Host`.
        credentials: botocore's, frozen.
        now: In UTC.
    """
    parts, stamp = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    host = parts.netloc.removesuffix(":443" if parts.scheme == "https" else ":80")
    named = {"host": host} | {name.lower(): value for name, value in headers.items()}
    names = ";".join(sorted(named))
    query = {
        "X-Amz-Algorithm": _ALGORITHM,
        "X-Amz-Credential": f"{credentials.access_key}/{scope}",
        "X-Amz-Date": stamp,
        "X-Amz-Expires": str(seconds),
        "X-Amz-SignedHeaders": names,
    }
    if credentials.token is not None:
        query["X-Amz-Security-Token"] = credentials.token
    pairs = [f"{key}={quote(value, safe='')}" for key, value in query.items()]
    lines = [f"{name}:{named[name]}" for name in sorted(named)]
    request = "\n".join([method, parts.path, "&".join(sorted(pairs)), *lines, "", names, "UNSIGNED-PAYLOAD"])
    text = "\n".join([_ALGORITHM, stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    return f"{url}?{'&'.join(pairs)}&X-Amz-Signature={signature}"
