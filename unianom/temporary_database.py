"""A database on disk for what would not fit in memory, such as the listing of millions of files.

SQLite sorts and groups on disk in a bounded amount of memory. Its temporary files lie in the folder SQLITE_TMPDIR or
TMPDIR, else /var/tmp, and have no name, so that the system removes them however the process ends.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from unianom.errors import MachineError

CACHE = 16 << 20
"""Bytes of a database that are held in memory; a sort holds as many again."""


@contextmanager
def temporary_database() -> Iterator[sqlite3.Connection]:
    """Give an empty database that is gone after the block. One thread at a time may use it.

    Raises:
        MachineError: inside the block, SQLite could not write or read it.
    """
    # an empty name means a temporary file; transactions are begun here, not by the module
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as database:
        database.execute(f"pragma cache_size = -{CACHE >> 10}")
        database.execute("pragma journal_mode = off")
        database.execute("pragma synchronous = off")
        database.execute("pragma temp_store = file")
        database.execute("begin")  # one transaction: nothing is ever undone or kept
        try:
            yield database
        except sqlite3.OperationalError as error:
            raise MachineError(
                f"a temporary database cannot be kept on disk ({error}); free space where temporary files lie (TMPDIR, "
                f"else /var/tmp), or name another place with TMPDIR, and run the same command again, it continues"
            ) from error
