import uuid

import pytest

from pipelines import storage
from unianom import files
from unianom.data.shards import MANIFEST
from unianom.errors import DataError

PLAN = {"source": "a", "resize": None, "limits": {"max_pixels": 5}}


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    """A folder that is not there yet, on disk or on an object store."""
    if request.param == "local":
        yield str(tmp_path / "output")
    else:
        uri = f"memory://test-{uuid.uuid4().hex}"
        yield uri
        files.remove(uri)


def put(output, *names):
    for name in names:
        files.write_bytes(files.join(output, name), b"{}")


def test_a_plan_claims_a_new_folder_and_finds_it_again(output):
    digest = storage.claim(output, PLAN, False, "ingest")
    assert digest == files.digest_of(PLAN)
    assert files.read_json(files.join(output, storage.PLAN)) == {"digest": digest, "plan": PLAN}
    put(output, "part-00000.parquet", "_part-00000.json")
    before = files.list_names(output)
    reordered = dict(reversed(PLAN.items()))
    assert storage.claim(output, reordered, False, "ingest") == digest
    assert files.list_names(output) == before


def test_overwrite_keeps_the_work_of_the_same_plan(output):
    """So that the command, with its --overwrite, continues after a crash."""
    storage.claim(output, PLAN, True, "ingest")
    put(output, "part-00000.parquet", "_part-00000.json")
    storage.claim(output, PLAN, True, "ingest")
    assert "part-00000.parquet" in files.list_names(output)


def test_another_plan_is_refused_and_what_differs_is_named(output):
    storage.claim(output, PLAN, False, "ingest")
    put(output, "part-00000.parquet")
    with pytest.raises(DataError, match=r"output of another ingest \(differing in: new, resize, source\).*--overwrite"):
        storage.claim(output, {"source": "b", "resize": 256, "limits": {"max_pixels": 5}, "new": 1}, False, "ingest")
    assert "part-00000.parquet" in files.list_names(output)
    assert files.read_json(files.join(output, storage.PLAN))["plan"] == PLAN


def test_overwrite_removes_the_work_of_another_plan(output):
    storage.claim(output, PLAN, False, "ingest")
    put(output, "part-00000.parquet", "_part-00000.json", MANIFEST, "bank/index")
    digest = storage.claim(output, {**PLAN, "source": "b"}, True, "ingest")
    assert files.list_names(output) == [storage.PLAN]
    assert files.read_json(files.join(output, storage.PLAN))["digest"] == digest
    assert not storage.is_complete(output)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_job_wrote_are_never_removed(output, overwrite):
    put(output, "holiday.jpg", "thesis/chapter.tex")
    with pytest.raises(DataError, match=r"holds other files \(holiday.jpg, thesis\); choose another output"):
        storage.claim(output, PLAN, overwrite, "ingest")
    assert files.list_names(output) == ["holiday.jpg", "thesis"]


def test_what_a_killed_run_left_half_written_is_no_obstacle(output):
    put(output, "_plan.json.1a2b3c4d.tmp")
    storage.claim(output, PLAN, False, "ingest")


@pytest.mark.parametrize("removals", range(5))
def test_a_removal_may_be_killed_at_any_point(output, removals, monkeypatch):
    """What is left is never taken for complete, nor a part for committed, and the same command goes on."""
    storage.claim(output, PLAN, False, "ingest")
    parts = {"part-00000.parquet": "_part-00000.json", "part-00001.parquet": "_part-00001.json"}
    put(output, *parts, *parts.values(), MANIFEST)
    remove, left = files.remove, [removals]

    def dying(uri):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(uri)

    monkeypatch.setattr(files, "remove", dying)
    with pytest.raises(KeyboardInterrupt):
        storage.claim(output, {**PLAN, "source": "b"}, True, "ingest")
    monkeypatch.setattr(files, "remove", remove)
    names = files.list_names(output)
    for part, record in parts.items():
        assert record not in names or part in names
    if storage.is_complete(output):
        assert removals < 3
        assert set(parts) <= set(names)
    assert files.read_json(files.join(output, storage.PLAN))["plan"] == PLAN
    storage.claim(output, {**PLAN, "source": "b"}, True, "ingest")
    assert files.list_names(output) == [storage.PLAN]


def test_a_part_counts_once_its_record_is_there(output):
    put(output, "part-00000.parquet")
    assert storage.part_record(output, "part-00000.parquet") is None
    storage.commit_part(output, "part-00000.parquet", {"plan": "d", "rows": 3})
    assert storage.part_record(output, "part-00000.parquet") == {"plan": "d", "rows": 3}
    assert files.list_names(output) == ["_part-00000.json", "part-00000.parquet"]


def test_finishing_sweeps_first_and_writes_the_manifest_last(output, monkeypatch):
    put(output, "part-00000.parquet", "part-00000.parquet.0a1b2c3d.tmp", "_plan.json.9f9f9f9f.tmp")
    assert not storage.is_complete(output)
    seen = []
    write_json = files.write_json
    monkeypatch.setattr(files, "write_json", lambda uri, c: (seen.append(files.list_names(output)), write_json(uri, c)))
    storage.finish(output, {"kind": "shard set"})
    assert seen == [["part-00000.parquet"]]
    assert storage.is_complete(output)
    assert files.list_names(output) == [MANIFEST, "part-00000.parquet"]
