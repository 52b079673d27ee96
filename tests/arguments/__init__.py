"""The public arguments and what is refused of them: tables by room, for ``tests/test_accepted_and_ignored.py``."""
