"""Blobs in an S3 bucket, with a folder as their cache."""
