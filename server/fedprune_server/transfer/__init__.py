"""Bytes of blobs on their way to boards and back."""
