"""The `labels` layout: what rows become, and what it says of tables that are wrong."""

from collections import Counter

import pytest

from tests.data.test_layouts import draw, facts, fails, left_out, lowest_hashes
from unianom.data.layouts import iter_samples
from unianom.data.layouts.labels import LabelsOptions
from unianom.data.layouts.source import Source
from unianom.data.layouts.tables import Table
from unianom.errors import DataError, OptionError

OPTIONS = LabelsOptions(table="t.csv", image="file", label="state", normal=("ok",))


def test_rows_become_samples(tmp_path):
    root = tmp_path / "line"
    draw(root, *(f"img/{n}.png" for n in range(7)), "img/unnamed.png", "m/5.png")
    lines = ["file,state,part,kind,mask", *(f"{n},OK,a,,m/5.png" for n in range(4)), "4,ok,b,,", "5,ng,a,dent,m/5.png"]
    (root / "t.csv").write_text("\n".join([*lines, "6,,a,,", "9,ng,b,,"]))
    options = LabelsOptions(
        table="t.csv", image="file", images="img", ending=".png", label="state", normal=("ok",), category="part",
        defect="kind", mask="mask", train_fraction=0.5,
    )  # fmt: skip
    tested = lowest_hashes([f"img/{n}.png" for n in range(4)], 2)  # of each category; of one image none is held out
    assert facts(list(iter_samples("labels", root, options))[:-1], root) == [
        *(
            (f"line/img/{n}.png", "a", "test" if f"img/{n}.png" in tested else "train", 0, "good", None)
            for n in range(4)
        ),
        ("line/img/4.png", "b", "train", 0, "good", None),
        ("line/img/5.png", "a", "test", 1, "dent", "m/5.png"),
        ("line/img/6.png", "a", "test", None, None, None),
    ]
    missing = list(iter_samples("labels", root, options))[-1]  # for ingest to reject
    assert (missing.uri, missing.size, missing.defect) == (f"{root}/img/9.png", None, "anomaly")
    summary, _ = left_out("labels", root, options)
    assert summary["files"][".png"] == {"count": 1, "example": f"{root}/img/unnamed.png"}


def test_splits_of_a_table(tmp_path):
    draw(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "t.csv").write_text("file,state,s\n0.png,ok,Train\n1.png,ok,valid\n2.png,ng,TEST\n3.png,ng,train\n")
    for handling, split in (("keep", "train"), ("test", "test")):
        options = LabelsOptions("", "t.csv", "file", label="state", normal=("ok",), split="s", abnormal_train=handling)
        samples = iter_samples("labels", tmp_path, options)
        assert [(s.split, s.label) for s in samples] == [("train", 0), ("val", 0), ("test", 1), (split, 1)]
    (tmp_path / "t.csv").write_text("file,state,s\n0.png,ok,5\n")
    fails(DataError, "split '5' in column s must be train, val or test", "labels", tmp_path, options)


@pytest.mark.parametrize("first", [("mask.png",) * 6, tuple("012345")])
def test_a_column_without_a_name_is_none_of_those_that_are_not_asked_for(tmp_path, first):
    """As the one that pandas writes for its index: taken for masks, or for a category each, it changes the samples."""
    draw(tmp_path, *(f"{n}.png" for n in range(6)), "mask.png")
    rows = ["file,state", *(f"{n}.png,{'ng' if n == 5 else 'ok'}" for n in range(6))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    expected = list(iter_samples("labels", tmp_path, OPTIONS))
    assert {sample.split for sample in expected if sample.label == 0} == {"train", "test"}
    (tmp_path / "t.csv").write_text("\n".join(f"{cell},{row}" for cell, row in zip(("", *first), rows, strict=True)))
    assert list(iter_samples("labels", tmp_path, OPTIONS)) == expected


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_kinds_of_tables(tmp_path, name):
    content = {
        "t.csv": "\ufefffile; state\r\n'a'.png; ok\r\n\"b;c.png\";ng\r\n",
        "t.tsv": "file\tstate\n'a'.png\tok\nb;c.png\tng",
        "t.jsonl": '{"file": "\'a\'.png", "state": "ok"}\n\n{"file": "b;c.png", "state": "ng"}\n',
        "t.json": '[{"file": "\'a\'.png", "state": "ok"}, {"file": "b;c.png", "state": "ng"}]',
    }
    (tmp_path / name).write_text(content[name])
    rows = [row for _, row in Table(Source.open(tmp_path), name)]
    assert rows == [{"file": "'a'.png", "state": "ok"}, {"file": "b;c.png", "state": "ng"}]


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("file,stat\na.png,ok", OptionError, "no column 'state' (did you mean 'stat'?); name that of the label"),
        ("file,state\n", DataError, "t.csv has no rows"),
        ("file,state\na.png,ok\n./a.png,ng", DataError, "names a.png a second time, after line 2 of"),
        ("file,state\n,ok", DataError, "names no image in column file"),
        ("file,state\n../a.png,ok", DataError, "../a.png lies outside of the root"),
        ("file,state\n/data/a.png,ok", DataError, "/data/a.png lies outside of the root"),
        ("file,state\na.png,good", OptionError, "column state holds good; say which of these mean normal with normal"),
        ("file,state\nö.png,ok".encode("latin-1"), DataError, "is not UTF-8 text; save it as UTF-8"),
    ],
)  # fmt: skip
def test_tables_that_are_wrong(tmp_path, text, error, sentence):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(error, sentence, "labels", tmp_path, OPTIONS)


def test_what_is_no_table(tmp_path):
    fails(OptionError, f"name the table of labels in {tmp_path} with table; found: nothing", "labels", tmp_path)
    fails(DataError, f"no file {tmp_path}/t.csv", "labels", tmp_path, OPTIONS)
    for name, content, sentence in (
        ("t.xlsx", b"PK", "is no table that can be read; its name should end in .csv"),
        ("t.jsonl", b"{oops", "holds no JSON lines"),
        ("t.json", b"[1]", "is not a JSON object"),
        ("t.parquet", b"PAR1", "is no Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        fails(DataError, sentence, "labels", tmp_path, LabelsOptions(table=name))
    (tmp_path / "t.csv").write_text("file,state\nsub\\a.png,ok\n")  # as Windows writes paths
    fails(OptionError, "is a file and so the table itself", "labels", tmp_path / "t.csv", OPTIONS)
    draw(tmp_path, "sub/a.png")
    alone = LabelsOptions(image="file", label="state", normal=("ok",), train_fraction=1)
    (sample,) = iter_samples("labels", tmp_path / "t.csv", alone)
    assert sample.uri == f"{tmp_path}/sub/a.png"
    assert Counter([sample.dataset, sample.category]) == {tmp_path.name: 2}
