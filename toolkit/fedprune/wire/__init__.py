"""The protocol between server and boards: messages, topics, chunks, transfers, the MQTT connection.

Not here: signatures (`security`) and what either side does with a message (`engine`, `agent`).
"""
