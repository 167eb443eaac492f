"""What isn't collected under a board's Python."""

import sys

# The server needs Python 3.11, and boards have no POT.
collect_ignore = (
    ["test_subflot.py", "test_transport.py", "test_transport_alignment.py"] if sys.version_info < (3, 11) else []
)
