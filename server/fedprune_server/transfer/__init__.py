"""Bytes of blobs between server, boards and bucket: uploads, downloads, HTTP.

Not here: storage on disk (`fedprune.blobs`) and in S3 (`storage.s3`).
"""
