"""Memory banks in folders: one FAISS file for each shard, and last the manifest that makes it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from unianom import files
from unianom.errors import ModelError, OptionError
from unianom.memory.bank_files import read_verified
from unianom.memory.faiss_indexes import load_faiss
from unianom.memory.origins import ORIGINS, Origins
from unianom.memory.proposals import PROPOSALS, Proposals
from unianom.memory.shard import Shard, all_vectors

Kind = Literal["flat", "ivf_flat"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class StoredBank(NamedTuple):
    """What a bank's folder holds; see `MemoryBank`."""

    shards: Sequence[Shard]
    kind: Kind
    metadata: dict[str, Any]
    origins: Origins | None
    proposals: Proposals | None


def write_bank(uri: str, bank: StoredBank) -> None:
    """Write a bank to a folder, in the place of any that lies there."""
    faiss = load_faiss()
    for name in files.list_names(uri):
        if name in (MANIFEST, ORIGINS, PROPOSALS) or name.endswith(".faiss"):
            files.remove(files.join(uri, name))
    entries = []
    for number, shard in enumerate(bank.shards):
        name = f"shard-{number:05d}-of-{len(bank.shards):05d}.faiss"
        content = faiss.serialize_index(shard.index).tobytes()
        files.write_bytes(files.join(uri, name), content)
        entries.append(
            {"file": name, "first_row": shard.first_row, "rows": shard.rows, "sha256": files.sha256_of(content)}
        )
    optional = {}
    if bank.origins is not None:
        optional["origins"] = {"file": ORIGINS, "sha256": bank.origins.save(uri)}
    if bank.proposals is not None:
        optional["proposals"] = {"file": PROPOSALS, "sha256": bank.proposals.save(uri)}
    index = bank.shards[0].index
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": bank.kind,
        "rows": sum(shard.rows for shard in bank.shards),
        "dimension": bank.shards[0].dimension,
        "parameters": {} if bank.kind == "flat" else {"nlist": index.nlist, "nprobe": index.nprobe},
        "shards": entries,
        **optional,
        "metadata": bank.metadata,
    }
    files.write_json(files.join(uri, MANIFEST), manifest)


def read_bank(uri: str) -> StoredBank:
    """Read a bank written by `write_bank`.

    Raises:
        ModelError: the folder is not a whole bank of this format, or a file is damaged; the message names it.
    """
    manifest = _read_manifest(uri)
    shards = [load_shard(uri, number) for number in range(len(manifest["shards"]))]
    first_row = 0
    for shard in shards:
        if shard.first_row != first_row:
            raise ModelError(f"the shards of the memory bank at {uri} leave a gap at row {first_row}; build it again")
        first_row += shard.rows
    if first_row != manifest["rows"]:
        raise ModelError(f"the memory bank at {uri} holds {first_row} rows, its manifest says {manifest['rows']}")
    origins, proposals = manifest.get("origins"), manifest.get("proposals")
    return StoredBank(
        shards,
        manifest["kind"],
        manifest["metadata"],
        None if origins is None else Origins.load(uri, origins["sha256"], first_row),
        None if proposals is None else Proposals.load(uri, proposals["sha256"], all_vectors(shards)),
    )


def load_shard(uri: str, number: int) -> Shard:
    """Read one shard of a saved bank, to be searched apart; `merge_results` joins what the shards answer.

    Raises:
        OptionError: the bank has no shard of this number.
        ModelError: see `MemoryBank.load`.
    """
    manifest = _read_manifest(uri)
    if not 0 <= number < len(manifest["shards"]):
        raise OptionError(f"the memory bank at {uri} has {len(manifest['shards'])} shards, there is no shard {number}")
    entry = manifest["shards"][number]
    place = files.join(uri, entry["file"])
    content = read_verified(place, entry["sha256"])
    faiss = load_faiss()
    try:
        index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    except RuntimeError as error:
        raise ModelError(f"{place} is not an index that FAISS {faiss.__version__} can read") from error
    expected = {"flat": faiss.IndexFlatL2, "ivf_flat": faiss.IndexIVFFlat}[manifest["kind"]]
    if type(index) is not expected or index.metric_type != faiss.METRIC_L2:
        raise ModelError(f"{place} holds a {type(index).__name__}, not the {expected.__name__} that its manifest says")
    if (index.ntotal, index.d) != (entry["rows"], manifest["dimension"]):
        raise ModelError(
            f"{place} holds {index.ntotal} rows of dimension {index.d}, "
            f"its manifest says {entry['rows']} of {manifest['dimension']}"
        )
    return Shard(index, entry["first_row"])


def _read_manifest(uri: str) -> dict[str, Any]:
    place = files.join(uri, MANIFEST)
    try:
        manifest = files.read_json(place)
    except FileNotFoundError as error:
        raise ModelError(f"{uri} is not a whole memory bank: it has no {MANIFEST}") from error
    except ValueError as error:
        raise ModelError(f"{place} is damaged: it is not JSON ({error}); copy the folder again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ModelError(f"{place} has format version {version}, this unianom reads {FORMAT_VERSION}")
    entries = manifest.get("shards")
    if (
        manifest.get("kind") not in get_args(Kind)
        or not all(isinstance(manifest.get(key), int) for key in ("rows", "dimension"))
        or not isinstance(manifest.get("metadata"), dict)
        or not all(_is_optional(manifest.get(key)) for key in ("origins", "proposals"))
        or not (isinstance(entries, list) and entries and all(_is_entry(entry) for entry in entries))
    ):
        raise ModelError(f"{place} is damaged: kind, rows, dimension, metadata or shards are missing or not valid")
    return manifest


def _is_entry(entry: Any) -> bool:
    types = {"file": str, "first_row": int, "rows": int, "sha256": str}
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in types.items())
        and files.is_plain_name(entry["file"])  # never read outside the folder
    )


def _is_optional(entry: Any) -> bool:
    return entry is None or (isinstance(entry, dict) and isinstance(entry.get("sha256"), str))
