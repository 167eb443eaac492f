"""A bucket of S3, or of a server with its API: objects under a prefix, and its failures as errors of this project.

Address and credentials come from boto3's usual environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and so on.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fedprune.core.errors import ConfigError, MissingExtraError, StorageError, error_reason
from fedprune.core.records import pattern_text
from fedprune.core.validation import is_digest

SCHEME = "s3://"

# Value of `blobs` for blobs in the state folder.
IN_FOLDER = "folder"

BLOBS_PREFIX = "blobs/"
OWNER_KEY = "job.json"
MODEL_KEY = "model.onnx"
FORMAT = "fedprune.blobs/1"

# Maximum bytes of `OWNER_KEY`: a foreign object of this name may have any size.
MAX_OWNER_BYTES = 2**16

_PIECE_BYTES = 2**18
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")

_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _MAX_ATTEMPTS = 5, 60, 3

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*")
_MISSING_CODES = ("NoSuchKey", "404", "NotFound")
_EXISTS_CODES, _UNSUPPORTED_CODES = ("PreconditionFailed", "412"), ("NotImplemented", "501")

# Another write of the same object is under way. A repeated write meets its result.
_CONFLICT_CODES = ("ConditionalRequestConflict", "409")

_MAX_CONFLICTS = 5

# Maximum number of objects that one request may delete: S3's own limit.
_MAX_DELETED_KEYS = 1000

_DENIED_CODES = ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class BucketError(StorageError):
    """A bucket can't be used at the moment."""


def parse_bucket_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of an address such as `s3://bucket/fleet/leaves`. Raises `ConfigError` for other texts."""
    name, _, prefix = url.removeprefix(SCHEME).partition("/")
    prefix = prefix.removesuffix("/")
    is_valid = url.startswith(SCHEME) and _BUCKET.fullmatch(name) and (not prefix or _PREFIX.fullmatch(prefix))
    if not is_valid or ".." in url or len(prefix) > 512:
        raise ConfigError(
            ("server", "blobs"),
            expected=f"{IN_FOLDER!r} or {SCHEME}bucket/prefix",
            got=repr(url.partition("@")[2] or url)[:200],  # what some put before an @ is a secret
            hint="Address and credentials come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    return name, f"{prefix}/" if prefix else ""


def digest_of(key: str) -> str | None:
    """The blob's digest in an object's key; None for a key that isn't ours."""
    if not key.startswith(BLOBS_PREFIX):
        return None
    digest, dot, nonce = key.removeprefix(BLOBS_PREFIX).partition(".")
    return digest if is_digest(digest) and dot and len(nonce) == 16 and nonce.isalnum() else None


_PrintableName = Annotated[str, pattern_text(r"[^\u0000-\u001f\u007f-\u009f]{1,200}", "1 to 200 printable characters")]


@dataclass(frozen=True)
class Owner:
    """The job that owns the blobs under a prefix, and the number (`id`) that its settings hold, too."""

    id: _PrintableName
    job: _PrintableName
    format: Annotated[str, pattern_text(re.escape(FORMAT), FORMAT)] = FORMAT


class Bucket:
    """The objects under a prefix, `s3://bucket/prefix`. Methods raise `BucketError` if the bucket can't be used.

    They may be called from several threads. They repeat a failed request a few times at most: a `RetryPolicy` waits for
    longer. Raises `ConfigError` if the URL is invalid, and `MissingExtraError` if boto3 isn't installed."""

    def __init__(self, url: str) -> None:
        self._name, self._prefix = parse_bucket_url(url)
        self.url = f"{SCHEME}{self._name}/{self._prefix}".rstrip("/")
        try:
            import boto3
            from botocore import exceptions
            from botocore.config import Config
        except ImportError as error:
            raise MissingExtraError(f"blobs at {SCHEME} need the package boto3", extra="scale") from error
        self._client_error: type[Exception] = exceptions.ClientError
        self._connection_error: type[Exception] = exceptions.BotoCoreError
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
            max_pool_connections=16,
            response_checksum_validation="when_required",  # readers compare the digest with the blob's name
            signature_version="s3v4",  # it also signs the headers of `upload_url`, which fix size and checksum
        )
        region = os.environ.get("AWS_REGION")  # boto3 itself only reads AWS_DEFAULT_REGION
        with self._translate_errors("open"):
            try:
                session = boto3.session.Session(region_name=region)
                self._client: Any = session.client("s3", config=config)
                if self._client.meta.endpoint_url.endswith(_AMAZON) and "." not in self._name:
                    # Otherwise an upload's address names no region, and Amazon may redirect it, which boards refuse.
                    self._client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "virtual"})))
            except ValueError as error:  # an endpoint that is no URL
                raise BucketError(f"can't open {self.url}: {error}", hint="Is AWS_ENDPOINT_URL right?") from error
        self._client.meta.events.register("before-call.s3.DeleteObjects", _with_md5)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Keys with this prefix, with the objects' sizes."""
        options: dict[str, str] = {}
        while True:
            with self._translate_errors("list"):
                page = self._client.list_objects_v2(Bucket=self._name, Prefix=self._prefix + prefix, **options)
            for entry in page.get("Contents", ()):
                yield str(entry["Key"])[len(self._prefix) :], int(entry["Size"])
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, key: str, data: bytes | memoryview, sha256: str, *, replace: bool = True) -> None:
        """Write an object; the bucket verifies its SHA-256. With `replace=False` an existing object stays, unless the
        bucket has no conditional writes.
        """
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        request = {"Bucket": self._name, "Key": self._prefix + key, "Body": bytes(data), "ChecksumSHA256": checksum}
        with self._translate_errors("write to"):
            for attempt in range(_MAX_CONFLICTS):
                try:
                    self._client.put_object(**request, **({} if replace else {"IfNoneMatch": "*"}))
                    return
                except self._client_error as error:  # noqa: PERF203 - once, as a rule
                    if not replace and _code(error) in _EXISTS_CODES:
                        return
                    if not replace and _code(error) in _UNSUPPORTED_CODES:
                        self._client.put_object(**request)
                        return
                    if replace or _code(error) not in _CONFLICT_CODES or attempt + 1 == _MAX_CONFLICTS:
                        raise

    def upload_url(self, key: str, sha256: str, size: int, seconds: int) -> str:
        """Presigned URL to PUT one object of this SHA-256 and size, valid for `seconds`."""
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        signed = {"Bucket": self._name, "Key": self._prefix + key, "ContentLength": size, "ChecksumSHA256": checksum}
        with self._translate_errors("sign an upload to"):
            return str(self._client.generate_presigned_url("put_object", Params=signed, ExpiresIn=seconds))

    def stream(self, key: str) -> Iterator[bytes]:
        """An object's bytes in pieces, not verified; none if it doesn't exist."""
        with self._open_object(key) as body_and_size:
            if body_and_size is not None:
                yield from body_and_size[0].iter_chunks(_PIECE_BYTES)

    def get(self, key: str, limit: int) -> bytes | None:
        """An object's bytes, not verified; None if it doesn't exist or is larger than `limit`."""
        with self._open_object(key) as body_and_size:
            return None if body_and_size is None or body_and_size[1] > limit else bytes(body_and_size[0].read())

    @contextmanager
    def _open_object(self, key: str) -> Iterator[tuple[Any, int] | None]:
        """An object's body and size; None if it doesn't exist."""
        with self._translate_errors("read"):
            try:
                answer = self._client.get_object(Bucket=self._name, Key=self._prefix + key)
            except self._client_error as error:
                if _code(error) not in _MISSING_CODES:
                    raise
                yield None
                return
            # Entering the body itself would return urllib3's stream, whose errors aren't boto3's.
            with closing(answer["Body"]) as body:
                yield body, int(answer["ContentLength"])

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, if they exist. Raises `BucketError` if one of them can't be deleted; the others are deleted
        nevertheless, unless the bucket can't be reached."""
        failures: list[Exception] = []
        with self._translate_errors("delete from"):
            for start in range(0, len(keys), _MAX_DELETED_KEYS):
                objects = [{"Key": self._prefix + key} for key in keys[start : start + _MAX_DELETED_KEYS]]
                try:
                    answer = self._client.delete_objects(Bucket=self._name, Delete={"Objects": objects, "Quiet": True})
                    failures += [
                        self._client_error({"Error": entry}, "DeleteObjects") for entry in answer.get("Errors", ())[:1]
                    ]
                except self._client_error as error:
                    failures += self._delete_each(objects) if _code(error) in _UNSUPPORTED_CODES else [error]
            for failure in failures[:1]:
                raise failure

    def _delete_each(self, objects: Sequence[Mapping[str, str]]) -> Sequence[Exception]:
        """Delete objects one by one, for servers without a request for several; returns the failures."""
        failures = []
        for each in objects:
            try:
                self._client.delete_object(Bucket=self._name, **each)
            except self._client_error as error:  # noqa: PERF203 - each turn waits for the network anyway
                failures.append(error)
        return failures

    @contextmanager
    def _translate_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except self._client_error as error:
            code = _code(error)
            hint = "See what the bucket's own log says."
            if code == "NoSuchBucket":
                hint = "Make the bucket, or give another name."
            elif code in _DENIED_CODES:
                hint = (
                    "Are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right? They must be allowed to list the bucket, "
                    "and to get, put and delete objects."
                )
            raise BucketError(f"can't {action} {self.url}: {error_reason(error)}", hint=hint) from error
        except (self._connection_error, OSError) as error:
            hint = "Is it running, and AWS_ENDPOINT_URL (or AWS_REGION) right?"
            if "redentials" in type(error).__name__:
                hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
            raise BucketError(f"can't {action} {self.url}: {error_reason(error)}", hint=hint) from error


def _with_md5(params: dict[str, Any], **_: Any) -> None:
    """Add the MD5 checksum to a request that deletes objects: older servers require it, and know no newer checksum."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
