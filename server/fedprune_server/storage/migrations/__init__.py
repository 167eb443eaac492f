"""How a database of an older version becomes one of this version, step by step. Alembic runs the steps.

A change of the schema is a file `versions/revision_NNNN.py` that follows the latest one, and a change of the tables in
`fedprune_server.storage.tables` to the same effect. A step names tables and columns itself: `tables` says what they are
today, a step what they were then. A step that was released is never changed. The tests compare what the steps make with
what `tables` says.
"""
