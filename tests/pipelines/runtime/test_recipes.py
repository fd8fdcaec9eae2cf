"""Recipes by name."""

from pathlib import Path

import pytest

from pipelines.runtime.cli import parse
from pipelines.runtime.recipes import FOLDER, find_recipe, nearest_recipes, recipe_names
from pipelines.training.options import train_options
from unianom.errors import OptionError

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
