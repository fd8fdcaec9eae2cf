"""Recipes by name."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime.cli import parse
from pipelines.runtime.given_options import with_recipe
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.recipes import FOLDER, find_recipe, nearest_recipes, recipe_names
from pipelines.training.options import train_options
from unianom.errors import OptionError
from unianom.options import to_plain

GIVEN = ["patchcore", "--shards", "s", "--output", "o"]


def test_every_recipe_has_a_name_and_is_found_by_it():
    paths = set(FOLDER.rglob("*.yaml"))
    assert {find_recipe(name) for name in recipe_names()} == paths
    assert {find_recipe(f"jobs/recipes/{path.relative_to(FOLDER)}") for path in paths} == paths
    assert {"patchcore_mvtec", "calibration/uniad"} <= set(recipe_names())
    assert find_recipe("calibration") is None
    assert find_recipe("../recipes/patchcore_mvtec") is None


def test_a_file_of_that_name_goes_before_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = ["--config", "patchcore_mvtec"]
    options = train_options()
    named = parse(options, [*GIVEN, *config])
    assert named == parse(options, [*GIVEN, "--config", str(FOLDER / "patchcore_mvtec.yaml")])
    Path("patchcore_mvtec").mkdir()  # such as the output of an earlier run
    assert parse(options, [*GIVEN, *config]) == named
    Path("patchcore_mvtec").rmdir()
    Path("patchcore_mvtec").write_text("seed: 9")
    assert parse(train_options(), [*GIVEN, *config]).seed == 9


@pytest.mark.parametrize(
    ("name", "near"),
    [("patchcore_mvtek", "patchcore_mvtec"), ("uniad", "uniad_"), ("calibration/uniat", "calibration/uniad")],
)
def test_the_nearest_recipes_are_named(name: str, near: str):
    assert near in " ".join(nearest_recipes(name))
    with pytest.raises(
        OptionError, match=rf"--config: there is no file {name}, and no recipe .*; did you mean .*{near}"
    ):
        parse(train_options(), [*GIVEN, "--config", name])


def test_where_none_is_near_it_is_said_where_they_are():
    with pytest.raises(
        OptionError, match=r"no file zzz.yaml, and no recipe of that name; recipes are listed in jobs/recipes"
    ):
        parse(train_options(), [*GIVEN, "--config", "zzz.yaml"])
    with pytest.raises(OptionError, match=r"cannot read memory://nowhere/x.yaml|no file memory://nowhere/x.yaml"):
        parse(train_options(), [*GIVEN, "--config", "memory://nowhere/x.yaml"])


def test_options_in_python_are_those_of_the_command_line():
    made = with_recipe(
        train_options()["patchcore"],
        "offline/patchcore",
        shards="s",
        output="o",
        method={"bank": {"coreset_ratio": 0.02}, "taps": (16,)},
        runtime=RuntimeOptions(local=True),
    )
    words = ["--config", "offline/patchcore", "--method.bank.coreset_ratio", "0.02", "--method.taps", "[16]"]
    assert to_plain(made) == to_plain(parse(train_options(), [*GIVEN, *words, "--runtime.local", "true"]))
    assert made.method.backbone.name == "tf_efficientnet_lite0"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shards": "s"}, "--output is required"),
        ({"shards": "s", "output": "o", "sheds": 1}, "no option 'sheds'; did you mean --shards"),
        ({"shards": "s", "output": "o", "method": {"bank": {"coreset_ratio": 2.0}}}, "coreset_ratio"),
    ],
)
def test_wrong_options_in_python_are_refused(values: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        with_recipe(train_options()["patchcore"], "offline/patchcore", **values)
