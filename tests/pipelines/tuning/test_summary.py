"""Tables, sections and prints of campaigns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.reporting.sections import read_section
from pipelines.tuning.category_gain import category_gain
from pipelines.tuning.figures.importance import importance_figure
from pipelines.tuning.printing import print_campaign
from pipelines.tuning.summary import section
from pipelines.tuning.tables import setting_rows, trial_rows
from tests.pipelines.tuning.made import setting, trial
from unianom import files, visual


def test_rows_are_flat_and_fit_csv() -> None:
    trials = [
        trial(0, "stopped", [0.4, 0.5], 0.5, values={"a.b": [1, "x"], "c": None, "d": True, "e": "text", "f": 2}),
        trial(1, "failed", [], None, values={"f": 0.25}, error="no memory", latency_ms=3.5),
    ]
    lines = list(csv.DictReader(io.StringIO(files.csv_bytes(trial_rows(trials)).decode())))
    first = {"trial": "t0", "status": "stopped", "progress": "20", "objective": "0.5", "seconds": "2.5"}
    assert lines[0] == {
        **first,
        **{"latency_ms": "", "memory_mb": "", "error": ""},
        **{"a.b": '[1, "x"]', "c": "null", "d": "true", "e": "text", "f": "2"},
    }
    # what a trial has no option of is empty
    assert {lines[1][key] for key in ("a.b", "c", "d", "e", "progress", "objective")} == {""}
    assert (lines[1]["f"], lines[1]["error"], lines[1]["latency_ms"]) == ("0.25", "no memory", "3.5")

    rows = setting_rows([setting(3, {"k": 5, "flag": False}, 0.75, by_category={"nut": 0.7})])
    assert rows == [
        {
            "trial": "trial-0003",
            "objective": 0.75,
            "k": 5,
            "flag": "false",
            "image_auroc": 0.75,
            "nut/objective": 0.7,
        }
    ]


def content(**changes: Any) -> dict[str, Any]:
    settings = [setting(n, {"method.k": n, "layers": ["a", "b"]}, 0.9 - n / 100) for n in range(7)]
    made = {
        "method": "patchcore",
        "search": "random",
        "objective": {"metrics": {"image_auroc": 1.0}, "validation": "120 held-out normals and 60 synthetic anomalies"},
        "counts": {"trials": 12, "done": 7, "stopped": 1, "failed": 2, "crashed": 1, "settings": 70},
        "seconds": 3725.0,
        "best": {**settings[0], "confirmed": 0.8875},
        "top": settings,
        "default": setting(99, {"method.k": 9}, 0.8, trial="default"),
        "importance": [{"option": "method.k", "importance": 1.25, "sd": 0.0625}],
        "front": ["trial-0000"],
        "category_gain": category_gain([setting(0, {}, 0.5, by_category={"bolt": 0.9, "nut": 0.8})]),
        "errors": [{"trial": f"trial-{n}", "error": "[red]no memory"} for n in range(7)],
    }
    return json.loads(json.dumps({**made, **changes}))


def test_a_report_reads_the_section(tmp_path: Path) -> None:
    (tmp_path / "importance.png").write_bytes(visual.png(importance_figure(content()["importance"])))
    made = section("Tuning", content(), {"importance.png": "Which options matter"})
    files.write_json(tmp_path / "section.json", made)
    read = read_section(str(tmp_path))
    assert read.title == "Tuning"
    assert [title for title, _ in read.figures] == ["Which options matter"]
    tables = {title: (columns, rows) for title, columns, rows in read.tables}
    columns, rows = tables["Best settings"]
    assert columns == ["", "default", "best", "2", "3", "4", "5"]
    found = {row[0]: row[1:] for row in rows}
    assert found["trial"] == ["default", *(f"trial-{n:04d}" for n in range(5))]  # the best one once
    assert found["objective"] == ["0.8000", "0.9000", "0.8900", "0.8800", "0.8700", "0.8600"]
    assert found["confirmed"] == ["", "0.8875", "", "", "", ""]
    assert found["layers"] == ["–", *["[a, b]"] * 5]
    assert tables["Importance of the options"][1] == [["method.k", "1.250", "0.062"]]
    assert tables["Gain of a setting for each category"][1][-1] == ["mean", "0.8500", "0.8500", "+0.0000", ""]
    assert len(tables["Trials without a result"][1]) == 7
    assert read.text[0] == (
        "70 settings of patchcore in 12 trials (random), 1 h 2 min. Objective: image_auroc on 120 held-out normals and "
        "60 synthetic anomalies."
    )
    assert "1 trial not run; the same command continues." in read.text


def test_a_section_of_nothing_holds_no_tables() -> None:
    counts = {"trials": 2, "done": 0, "stopped": 0, "failed": 0, "crashed": 0, "settings": 0}
    weights = {"metrics": {"image_auroc": 1.0, "aupro": 0.5}, "validation": "images"}
    empty = content(
        best=None,
        top=[],
        default=None,
        importance=[],
        category_gain=[],
        errors=[],
        counts=counts,
        objective=weights,
        search={"algorithm": "asha", "seed": 0},
        seconds=75.2,
    )
    made = section("Tuning", empty, {})
    assert made["tables"] == []
    assert made["text"] == [
        "0 settings of patchcore in 2 trials (algorithm asha, seed 0), 1 min 15 s. Objective: 1 · image_auroc + "
        "0.5 · aupro on images.",
        "2 trials not run; the same command continues.",
        "No setting was measured, so there is no best one.",
    ]
    print_campaign(empty)


def test_print_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    print_campaign(content())
    text = capsys.readouterr().out
    assert "best settings" in text
    assert "trial-0004" in text
    assert "trial-0005" not in text
    assert text.count("[a, b]") == 5  # which the terminal's markup would swallow
    assert ["12", "7", "1", "2", "1", "70", "1", "h", "2", "min"] in [line.split() for line in text.splitlines()]
    assert "note: 2 trials failed" in text
    assert "  trial-4: [red]no memory" in text
    assert "  and 2 more" in text


def test_a_campaign_without_top_prints_its_best(capsys: pytest.CaptureFixture[str]) -> None:
    told = content(best={**content()["best"], "confirmed": {"objective": 0.7777}})
    del told["top"]
    print_campaign(told)
    text = capsys.readouterr().out
    assert "trial-0000" in text
    assert "0.7777" in text
