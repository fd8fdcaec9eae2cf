"""Files of a memory bank's folder, read only if they are those of its manifest."""

from __future__ import annotations

from unianom import files
from unianom.errors import ModelError


def read_verified(path: str, sha256: str) -> bytes:
    """Return the content of a file of a bank.

    Args:
        path: path or URI of the file.
        sha256: of the file, as the bank's manifest has it.

    Raises:
        ModelError: it is missing, or another one.
    """
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing from the memory bank; copy the whole folder again") from error
    if files.sha256_of(content) != sha256:
        raise ModelError(f"{path} is damaged: its SHA-256 is not the one in the bank's manifest; copy the folder again")
    return content
