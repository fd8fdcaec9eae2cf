import hashlib
import json

import numpy as np
import pytest

from pipelines.runtime.model_set import INDEX, ModelSet, write_index
from pipelines.runtime.models import load_memory_method, load_model, memory_method_class, trained_method
from tests.methods.conftest import TINY, tiny_method
from unianom import files
from unianom.errors import DataError, ModelError
from unianom.execution import CPU
from unianom.methods import METHODS
from unianom.model import Model


def write_description(folder, **changes):
    """Enough of a model folder to be found."""
    description = {
        "method": "uniformaly",
        "config": {"seed": 0},
        "categories": ["nut"],
        "threshold": None,
        "provenance": {"notice": None},
        "weights_sha256": "5e" * 32,
        **changes,
    }
    files.write_json(files.join(folder, "model.json"), description)
    return description


def test_one_model_for_all(tmp_path):
    description = write_description(tmp_path)
    model_set = ModelSet.open(str(tmp_path))
    assert model_set.folders == [str(tmp_path)]
    assert model_set.folder_of("nut") == model_set.folder_of("anything") == str(tmp_path)
    (found,) = model_set.descriptions()
    del description["weights_sha256"]
    digest = hashlib.sha256((tmp_path / "model.json").read_bytes()).hexdigest()
    assert found == {"digest": digest, "calibrator": None, "decision_rule": None, **description}


@pytest.mark.parametrize("store", ["local", "memory"])
def test_one_model_for_each_category(tmp_path, store):
    root = str(tmp_path) if store == "local" else "memory://test-shelf"
    try:
        for category in ("nut", "bolt"):
            write_description(files.join(root, category), categories=[category])
        write_index(root, {"nut": "nut", "bolt": "bolt"})
        model_set = ModelSet.open(root)
        assert [folder.rsplit("/", 1)[1] for folder in model_set.folders] == ["bolt", "nut"]
        assert files.exists(files.join(model_set.folder_of("nut"), "model.json"))
        assert [found["categories"] for found in model_set.descriptions()] == [["bolt"], ["nut"]]
        with pytest.raises(DataError, match=r"no model for category 'cog' in .*; it has models for bolt, nut"):
            model_set.folder_of("cog")
    finally:
        files.remove("memory://test-shelf")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/model", "a/b", "..", "", 3, None])
def test_an_index_names_folders_beside_it_only(tmp_path, name):
    write_description(tmp_path / "elsewhere")
    write_index(str(tmp_path / "model_set"), {"nut": name})
    with pytest.raises(ModelError, match=r"models.json names .*, which is no folder beside it"):
        ModelSet.open(str(tmp_path / "model_set"))


@pytest.mark.parametrize("content", [[], {}, "nut"])
def test_an_index_of_another_form_is_damaged(tmp_path, content):
    files.write_json(tmp_path / INDEX, content)
    with pytest.raises(ModelError, match=r"models.json is damaged: it names no folder for a category"):
        ModelSet.open(str(tmp_path))


def test_the_index_does_not_depend_on_the_order_of_fitting(tmp_path):
    write_index(str(tmp_path / "a"), {"nut": "nut", "bolt": "bolt"})
    write_index(str(tmp_path / "b"), {"bolt": "bolt", "nut": "nut"})
    assert (tmp_path / "a" / INDEX).read_bytes() == (tmp_path / "b" / INDEX).read_bytes()


def test_what_is_no_model_says_what_was_found(tmp_path):
    with pytest.raises(ModelError, match=r"no model in .* \(found: nothing\); give a folder that jobs/train.py wrote"):
        ModelSet.open(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"found: notes.txt"):
        ModelSet.open(str(tmp_path))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ModelError, match=r"models.json is damaged"):
        ModelSet.open(str(tmp_path))
    write_index(str(tmp_path), {"nut": "nut"})
    model_set = ModelSet.open(str(tmp_path))
    with pytest.raises(ModelError, match=r"nut/model.json is missing"):
        model_set.descriptions()
    (tmp_path / "nut").mkdir()
    for content in ("{", json.dumps({"method": "uniformaly"}), "null", "[]", "[" * 100_000):
        (tmp_path / "nut/model.json").write_text(content)
        with pytest.raises(ModelError, match=r"nut/model.json is damaged"):
            model_set.descriptions()


def test_a_model_loads_from_an_object_store_as_from_disk(tmp_path):
    model = Model(tiny_method("patchcore"), ["nut"])
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    (expected,) = model.predict([image])
    try:
        for root in (str(tmp_path / "model"), "memory://test-model/model"):
            model.save(root)
            loaded = load_model(root, CPU)
            (result,) = loaded.predict([image])
            assert result.score == expected.score
            np.testing.assert_array_equal(result.anomaly_map, expected.anomaly_map)
            assert loaded.digest == ModelSet.open(root).descriptions()[0]["digest"]
    finally:
        files.remove("memory://test-model")


def test_methods_of_another_kind_are_refused(tmp_path):
    for name in ("patchcore", "uniad"):
        Model(METHODS[name](TINY[name].config).eval(), ["nut"]).save(str(tmp_path / name))
    assert load_memory_method(str(tmp_path / "patchcore"), CPU).name == "patchcore"
    assert trained_method(load_model(str(tmp_path / "uniad"), CPU).method).name == "uniad"
    assert memory_method_class("patchcore") is METHODS["patchcore"]
    with pytest.raises(ModelError, match="uniad has no memory bank; give a model of a memory method"):
        load_memory_method(str(tmp_path / "uniad"), CPU)
    with pytest.raises(ModelError, match="uniad has no memory bank; give a memory method"):
        memory_method_class("uniad")
    with pytest.raises(ModelError, match="patchcore is not trained; give a model of a trained method"):
        trained_method(load_model(str(tmp_path / "patchcore"), CPU).method)
