"""The way to the server and back: signed messages, downloads, uploads."""
