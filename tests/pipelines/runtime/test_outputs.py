import json
import os
import uuid
from pathlib import Path

import pytest

from pipelines.runtime import outputs
from pipelines.runtime.outputs import LOCK, PLAN, check_output, open_cache, open_file, open_output
from unianom import files
from unianom.data.shards import MANIFEST
from unianom.errors import DataError, OptionError

INGEST = {"layout": "mvtec", "source": "a", "resize": None, "limits": {"max_pixels": 5}}
PARTS = {"part-00000.parquet": "_part-00000.json", "part-00001.parquet": "_part-00001.json"}

OLD_PLANS = {
    "shard set": INGEST,
    "score set": {"models": ["d"], "maps": True, "fold_batch_norm": False, "shards": "d"},
    "model": {"method": "patchcore", "few_shot": None, "weights": None, "threshold": {}, "shards": "d"},
    "calibrated model": {"model": "m", "found_by": "d", "calibration": {}},
    "decision set": {"rule": {}, "normals": "d", "queue": 3},
    "clustering": {"clusters": 3, "n_init": 1, "pooling": "p", "models": ["d"]},
    "semantic protocol": {"protocol": "semantic", "tasks": {}, "method": "m", "weights": None},
    "low-shot protocol": {"protocol": "low_shot", "shots": [1], "draws": 2, "method": "m", "weights": None},
    "campaign": {"space": [], "search": "random", "objective": {}, "method": "m", "weights": None},
}
"""Plans as the last version wrote them, without their job."""


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


def claim(output, plan=INGEST, kind="shard set", **more):
    with open_output(output, kind, plan, **more) as digest:
        return digest


# ------------------------------------------------------------------------------------------------------- one's own plan
def test_a_plan_claims_a_new_folder_and_finds_it_again(output):
    digest = claim(output)
    assert digest == files.digest_of(INGEST)
    assert files.read_json(files.join(output, PLAN)) == {"job": "shard set", "digest": digest, "plan": INGEST}
    put(output, *PARTS, *PARTS.values())
    before = files.list_names(output)
    assert claim(output, dict(reversed(INGEST.items()))) == digest
    assert files.list_names(output) == before


@pytest.mark.parametrize("kind", OLD_PLANS)
def test_the_plan_of_an_earlier_version_is_known_without_its_job(output, kind):
    digest = files.digest_of(OLD_PLANS[kind])
    files.write_json(files.join(output, PLAN), {"digest": digest, "plan": OLD_PLANS[kind]})
    assert claim(output, OLD_PLANS[kind], kind) == digest
    put(output, "part")
    for other in OLD_PLANS:
        if other != kind:
            with pytest.raises(DataError, match=rf"holds {outputs.KINDS[kind].words} of jobs/\w+.py.*; choose another"):
                claim(output, OLD_PLANS[other], other, overwrite=True)
    assert files.list_names(output) == [PLAN, "part"]


def test_overwrite_keeps_the_work_of_the_same_plan(output):
    """So that the command, with its --overwrite, continues after a crash."""
    claim(output, overwrite=True)
    put(output, *PARTS, *PARTS.values())
    claim(output, overwrite=True)
    assert set(PARTS) <= set(files.list_names(output))


def test_another_plan_is_refused_and_what_differs_is_named(output):
    claim(output)
    put(output, "part-00000.parquet")
    other = {**INGEST, "source": "b", "resize": 256, "new": 1}
    message = r"a shard set of another run \(differing in: new, resize, source\); choose .*--overwrite true"
    with pytest.raises(DataError, match=message):
        claim(output, other)
    assert "part-00000.parquet" in files.list_names(output)
    assert files.read_json(files.join(output, PLAN))["plan"] == INGEST


def test_what_half_written_files_a_killed_run_left_is_removed_when_it_goes_on(output):
    claim(output)
    put(output, "part-00000.parquet.0a1b2c3d.tmp", "_plan.json.1a2b3c4d.tmp", "notes.txt", "notes.0a1b2c3d.tmp")
    claim(output)
    assert files.list_names(output) == [PLAN, "notes.0a1b2c3d.tmp", "notes.txt"]


# ------------------------------------------------------------------------------------------ what is not one's own stays
def test_overwrite_removes_only_files_that_the_job_writes(output):
    claim(output)
    kept = ["notes.md", "part-one.parquet", "nested/_manifest.json", "nested/part-00000.parquet", "report.tmp"]
    put(output, *PARTS, *PARTS.values(), MANIFEST, "_rejected.parquet", "part-00000.parquet.0a1b2c3d.tmp", *kept)
    other = {**INGEST, "source": "b"}
    digest = claim(output, other, overwrite=True)
    assert files.list_files(output) == sorted([PLAN, *kept])
    assert files.read_json(files.join(output, PLAN))["digest"] == digest
    assert not outputs.is_complete(output)


def test_overwrite_of_a_model_removes_its_folders_once_they_are_empty(output):
    plan = OLD_PLANS["model"]
    claim(output, plan, "model")
    own = ["bank/manifest.json", "bank/shard-00000-of-00001.faiss", "_work/encoder/model.json", "weights.safetensors"]
    put(output, "model.json", *own, "bank/why.txt")
    claim(output, {**plan, "seed": 2}, "model", overwrite=True)
    assert files.list_files(output) == [PLAN, "bank/why.txt"]
    if "://" not in output:  # a store has no folders of their own
        assert files.list_names(output) == [PLAN, "bank"]


@pytest.mark.parametrize("names", [["holiday.jpg", "thesis/chapter.tex"], ["mine.tmp"], ["_work/x"], [".hidden"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_job_wrote_are_refused_and_stay(output, overwrite, names):
    put(output, *names)
    shown = ", ".join(sorted({name.split("/")[0] for name in names}))
    with pytest.raises(DataError, match=rf"holds other files \({shown}\); choose another output"):
        claim(output, overwrite=overwrite)
    assert files.list_files(output) == sorted(names)


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b'{"digest": "x", "plan": {"layout": 1, "source": 2}}', b'{"plan": 3}']
)
def test_a_plan_file_of_something_else_is_no_plan(output, content):
    files.write_bytes(files.join(output, PLAN), content)
    put(output, "mine.txt")
    with pytest.raises(DataError, match=r"holds other files"):
        claim(output, overwrite=True)
    assert files.list_files(output) == [PLAN, "mine.txt"]


def test_a_lock_file_of_something_else_stays(output):
    files.write_bytes(files.join(output, LOCK), b"my own lock")
    with pytest.raises(DataError, match=r"holds other files \(_lock.json\)"):
        claim(output)
    assert files.read_bytes(files.join(output, LOCK)) == b"my own lock"


def test_a_plan_of_a_later_version_is_refused(output):
    files.write_json(files.join(output, PLAN), {"job": "hologram", "digest": files.digest_of({}), "plan": {}})
    with pytest.raises(DataError, match="holds the output of another version of this software"):
        claim(output, overwrite=True)


def test_an_output_of_before_there_was_a_plan_is_replaced_only_if_asked_for(output):
    put(output, "evaluation.json", "categories.csv", "_work/0123456789ab/part.npz")
    with pytest.raises(
        DataError, match=r"holds an evaluation of another run \(of an earlier version.*--overwrite true"
    ):
        claim(output, {"scores": "d"}, "evaluation")
    with pytest.raises(DataError, match=r"holds an evaluation of jobs/evaluate.py; choose another output"):
        claim(output, {"x": 1}, "comparison", overwrite=True)
    assert files.list_files(output) == ["_work/0123456789ab/part.npz", "categories.csv", "evaluation.json"]
    claim(output, {"scores": "d"}, "evaluation", overwrite=True)
    assert files.list_files(output) == [PLAN]


def test_evaluation_files_among_others_are_other_files(output):
    put(output, "evaluation.json", "my.xlsx")
    with pytest.raises(DataError, match="holds other files"):
        claim(output, {"scores": "d"}, "evaluation", overwrite=True)


def test_models_of_an_earlier_version_are_taken_over(output):
    plan = OLD_PLANS["model"]
    files.write_json(files.join(output, "bottle", PLAN), {"digest": files.digest_of(plan), "plan": plan})
    put(output, "bottle/model.json", "models.json")
    claim(output, {"models": {"bottle": "d"}}, "models")
    assert "bottle/model.json" in files.list_files(output)


def test_a_folder_of_folders_is_no_set_of_models(output):
    put(output, "bottle/model.json", "models.json")
    with pytest.raises(DataError, match="holds other files"):
        claim(output, {"models": {"bottle": "d"}}, "models", overwrite=True)


@pytest.mark.parametrize("below", [[], ["deeper", "still"]])
def test_a_file_where_a_folder_is_to_be_written_stays(tmp_path, below):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(DataError, match=r"notes.txt is a file, where a folder is to be written"):
        claim(str(path.joinpath(*below)), overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("target", ["nowhere", "link"])
@pytest.mark.parametrize("below", [[], ["deeper", "still"]])
def test_a_link_that_leads_nowhere_is_named_and_stays(tmp_path, target, below):
    link = tmp_path / "link"
    link.symlink_to(target)
    words = rf"link is a link to {target}, which is not there, where a folder is to be written; choose another output"
    with pytest.raises(DataError, match=words):
        claim(str(link.joinpath(*below)), overwrite=True)
    assert link.is_symlink()
    assert [found.name for found in tmp_path.iterdir()] == ["link"]


def test_the_lock_of_a_process_that_just_ended_is_no_file_of_anyone(output, monkeypatch):
    """It is listed, and gone when it is read."""
    claim(output)
    listed = files.list_names
    monkeypatch.setattr(files, "list_names", lambda uri: [*listed(uri), LOCK])
    check_output(output, "shard set", INGEST)


@pytest.mark.parametrize("removals", range(5))
def test_a_removal_may_be_killed_at_any_point(output, removals, monkeypatch):
    """What is left is never taken for complete, nor a part for committed, and the same command goes on."""
    claim(output)
    put(output, *PARTS, *PARTS.values(), MANIFEST)
    remove, left = files.remove_file, [removals]

    def dying(folder, name):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(folder, name)

    monkeypatch.setattr(files, "remove_file", dying)
    with pytest.raises(KeyboardInterrupt):
        claim(output, {**INGEST, "source": "b"}, overwrite=True)
    monkeypatch.setattr(files, "remove_file", remove)
    names = files.list_names(output)
    for part, record in PARTS.items():
        assert record not in names or part in names
    if outputs.is_complete(output):
        assert removals < 3
        assert set(PARTS) <= set(names)
    assert files.read_json(files.join(output, PLAN))["plan"] == INGEST
    claim(output, {**INGEST, "source": "b"}, overwrite=True)
    assert files.list_names(output) == [PLAN]


# ----------------------------------------------------------------------------------------------------- inputs and links
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "words"), [("", "is"), ("/", "is"), ("/below/it", "lies within"), ("/..", "contains")]
)
def test_an_output_that_touches_an_input_is_refused(tmp_path, overwrite, place, words):
    source = tmp_path / "around" / "source"
    put(str(source), "image.png")
    with pytest.raises(OptionError, match=rf"the output \S+ {words} the input --source "):
        claim(f"{source}{place}", inputs={"source": str(source)}, overwrite=overwrite)
    assert files.list_files(str(tmp_path)) == ["around/source/image.png"]


@pytest.mark.parametrize("place", ["", "/new"])
def test_an_output_that_touches_an_input_by_a_link_is_refused(tmp_path, place):
    source, link = tmp_path / "source", tmp_path / "link"
    put(str(source), "image.png")
    link.symlink_to(source)
    for output, given in ((f"{link}{place}", source), (f"{source}{place}", link)):
        with pytest.raises(OptionError, match=r"(is|lies within) the input"):
            claim(output, inputs={"source": str(given)}, overwrite=True)


def test_uris_of_one_store_are_compared_too():
    root = f"memory://test-{uuid.uuid4().hex}"
    put(root, "shards/part.parquet")
    with pytest.raises(OptionError, match="lies within"):
        claim(f"{root}/shards/scores", inputs={"shards": f"{root}/shards/"})
    claim(f"{root}/shards-2", inputs={"shards": f"{root}/shards", "nothing": None, "gone": f"{root}/gone"})
    files.remove(root)


def test_links_below_an_output_are_not_followed(tmp_path):
    treasure, output = tmp_path / "treasure", tmp_path / "output"
    put(str(treasure), "manifest.json", "shard-00000-of-00001.faiss")
    claim(str(output), OLD_PLANS["model"], "model")
    (output / "bank").symlink_to(treasure)
    claim(str(output), {**OLD_PLANS["model"], "seed": 2}, "model", overwrite=True)
    assert files.list_names(str(treasure)) == ["manifest.json", "shard-00000-of-00001.faiss"]


def test_a_claim_that_is_refused_writes_nothing(output):
    put(output, "mine.txt")
    for _ in range(2):
        with pytest.raises(DataError):
            claim(output)
    with pytest.raises(DataError):
        check_output(output, "shard set", INGEST)
    assert files.list_files(output) == ["mine.txt"]


# ----------------------------------------------------------------------------------------------------- caches and files
def test_a_cache_is_made_once(output):
    for complete in (False, True):
        with open_cache(output, "features", {"a": 1}) as found:
            assert found is complete
            if not complete:
                outputs.finish(output, {"rows": 1})


def test_a_complete_output_is_found_without_a_lock(tmp_path):
    """So that it may lie where nothing can be written any more."""
    output = str(tmp_path / "output")
    claim(output)
    outputs.finish(output, {})
    with open_output(output, "shard set", INGEST):
        assert files.list_names(output) == [MANIFEST, PLAN]


@pytest.mark.parametrize("kind", outputs.KINDS)
def test_an_output_is_locked_while_it_is_written(output, kind):
    with open_output(output, kind, INGEST), open_output(output, kind, INGEST):
        holder = json.loads(files.read_bytes(files.join(output, LOCK)))
        assert holder["process"] == os.getpid()
    assert files.list_names(output) == [PLAN]


def made_by(content):
    return content[4:].decode() if content.startswith(b"own ") else None


def test_a_file_is_replaced_only_if_the_job_wrote_it_and_it_is_asked_for(tmp_path):
    path = tmp_path / "report.html"

    def write(digest, **more):
        with open_file(str(path), "a report", digest, made_by, **more) as made:
            path.write_bytes(b"own " + digest.encode())
            return made

    assert not write("a")
    assert write("a")
    with pytest.raises(DataError, match=r"holds a report made of something else; .*--overwrite true"):
        write("b")
    assert not write("b", overwrite=True)
    path.write_bytes(b"my page")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is a file that is not a report"):
            write("b", overwrite=overwrite)
    assert path.read_bytes() == b"my page"
    with pytest.raises(OptionError, match="lies within the input --evaluation"):
        write("b", inputs={"evaluation": str(tmp_path)})
    assert [name.name for name in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with (
        pytest.raises(DataError, match="is a folder, where a file is to be written"),
        open_file(str(tmp_path), "a report", "d", made_by),
    ):
        pass


# ---------------------------------------------------------------------------------------------------- parts of a folder
def test_what_is_in_the_way_of_a_file_is_named(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link.html").symlink_to("nowhere.html")
    os.mkfifo(tmp_path / "pipe.html")
    for name, words in (
        ("mine/deeper/r.html", "mine is a file, where the folder of"),
        ("link.html/r.html", r"link.html is a link to nowhere.html, which is not there, where the folder of"),
        ("link.html", "link.html is a link to nowhere.html, which is not there; choose another output"),
        ("pipe.html", "pipe.html is neither file nor folder, where a file is to be written"),
    ):
        with (
            pytest.raises(DataError, match=words),
            open_file(str(tmp_path / name), "a report", "d", lambda page: None, overwrite=True),
        ):
            pass
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link.html", "mine", "pipe.html"]
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_part_counts_once_its_record_is_there(output):
    put(output, "part-00000.parquet")
    assert outputs.part_record(output, "part-00000.parquet") is None
    outputs.commit_part(output, "part-00000.parquet", {"plan": "d", "rows": 3})
    assert outputs.part_record(output, "part-00000.parquet") == {"plan": "d", "rows": 3}
    assert files.list_names(output) == ["_part-00000.json", "part-00000.parquet"]


def test_finishing_sweeps_first_and_writes_the_manifest_last(output, monkeypatch):
    claim(output)
    put(output, "part-00000.parquet", "part-00000.parquet.0a1b2c3d.tmp", "mine.9f9f9f9f.tmp")
    assert not outputs.is_complete(output)
    seen = []
    write_json = files.write_json
    monkeypatch.setattr(files, "write_json", lambda uri, c: (seen.append(files.list_names(output)), write_json(uri, c)))
    outputs.finish(output, {"kind": "shard set"})
    assert seen == [[PLAN, "mine.9f9f9f9f.tmp", "part-00000.parquet"]]
    assert outputs.is_complete(output)
    assert MANIFEST in files.list_names(output)


def test_every_kind_of_output_names_a_job():
    jobs = {path.stem.rstrip("_") for path in (Path(__file__).parents[3] / "jobs").glob("*.py")}
    assert {kind.job for kind in outputs.KINDS.values()} <= jobs
