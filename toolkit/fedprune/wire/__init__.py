"""The wire: what devices and server say to each other over MQTT, and how blobs travel.

`messages` are small JSON, `chunk`s are the pieces of blobs, `transfer` pulls and serves blobs without doing any network
I/O, `topics` names the MQTT topics and `link` is the connection to the broker.
"""
