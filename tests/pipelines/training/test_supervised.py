"""Training from labels and masks: the whole pipeline with a small method of its own, in this process, without Ray."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

from pipelines.data.splits import choose_samples
from pipelines.runtime.models import load_model
from pipelines.training import driver as module
from pipelines.training import worker
from pipelines.training.context import LocalContext
from pipelines.training.dataset import ShardImages, TrainingSet, to_input
from pipelines.training.driver import train_networks
from pipelines.training.loader import BatchLoader
from pipelines.training.options import DataOptions, ThresholdOptions, TrainingOptions
from pipelines.training.per_category import FitResult
from pipelines.training.prepared import learnable
from pipelines.training.sampler import EpochIndex, StepSampler
from pipelines.training.samples import TrainingImages
from pipelines.training.trainer import Trainer
from tests.methods.conftest import TINY
from tests.pipelines.sharded import LABELLED, LABELLED_PARTS, LIMITS, POLICY, masked, sample, samples, write_shards
from unianom.configs.backbone import BackboneConfig
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.configs.uninet import UniNetTraining
from unianom.data.image import InputPolicy
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU
from unianom.methods import METHODS, Prediction
from unianom.methods.trained import BatchSpec, FeatureMaps, TrainedMethod, TrainingBatch

TRAINING = TrainingConfig(epochs=4, batch_size=4, learning_rate=3e-3, decay_at=(), clip_norm=None)


@dataclass(frozen=True)
class MarkedConfig:
    """Options of `Marked`."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("resnet10t", weights="random"))
    input: InputPolicy = POLICY
    training: TrainingConfig = TRAINING
    augmentation: Augmentation = field(default_factory=Augmentation)
    masks: bool = True
    repeats: int = 1
    dropout: float = 0.2


class Marked(TrainedMethod):
    """One convolution learns to mark what masks mark, or what is in anomalous images."""

    name = "marked"
    Config = MarkedConfig

    def __init__(self, config: MarkedConfig) -> None:
        super().__init__()
        self.config = config
        self.mark = nn.Conv2d(6, 1, 5, padding=2)
        self.dropout = nn.Dropout(config.dropout)
        self.anomalous = 0

    @property
    def batch_spec(self) -> BatchSpec:
        config = self.config
        return BatchSpec(
            augmentation=config.augmentation, images=True, labels=True, masks=config.masks, repeats=config.repeats
        )

    def frozen_features(self, images: Tensor) -> FeatureMaps:
        return {"pooled": avg_pool2d(images, 8)}

    def feature_key(self) -> dict[str, Any]:
        return {"method": self.name}

    def training_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        assert batch.label is not None
        logits = self._logits(batch.images, self.features_of(batch))
        self.anomalous += int(batch.label.sum())
        if batch.mask is None:
            return {"loss": binary_cross_entropy_with_logits(logits.mean((1, 2, 3)), batch.label.float())}
        assert not batch.mask[batch.label == 0].any()
        return {"loss": binary_cross_entropy_with_logits(logits, batch.mask)}

    def predict(self, images: Tensor) -> Prediction:
        maps = self._logits(images, self.frozen_features(images))[:, 0].sigmoid()
        return Prediction(maps, maps.amax((1, 2)), maps, maps[:, None])

    def _logits(self, images: Tensor | None, features: FeatureMaps) -> Tensor:
        assert images is not None
        coarse = nn.functional.interpolate(features["pooled"], scale_factor=8.0)
        return self.mark(self.dropout(torch.cat([images, coarse], dim=1)))


def make(config: MarkedConfig) -> Marked:
    torch.manual_seed(0)
    return Marked(config)


# ------------------------------------------------------------------------------------------------------------- steps
CHANGED = MarkedConfig(augmentation=Augmentation(("*",), ("*",), ("*",), 0.5, rotation=90), repeats=3)
"""With dropout and augmentation: a run that lost its random state or its place would differ."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("labelled"), LABELLED_PARTS)


def training_set(method: Marked, shards: ShardSet) -> TrainingSet:
    images = TrainingImages.choose(shards, shards.categories, None, labels=True)
    pixels = ShardImages(shards, shards.categories, images, POLICY, LIMITS, 8, labels=True, masks=True)
    return TrainingSet(
        images, shards.categories, method.batch_spec, pixels, None, None, None, method.config.training.seed
    )


def trainer(method: Marked, shards: ShardSet, iterations: int = 24) -> Trainer:
    order = StepSampler(18, method.config.training.seed, 4)
    batches = BatchLoader(training_set(method, shards), order, 0, pin=False, repeats=method.batch_spec.repeats)
    return Trainer(method, batches, iterations, order.share)


def run(steps: Trainer, end: int) -> list[float]:
    return [float(told["losses"]["loss"]) for told in steps.steps(end)]


def weights(method: Marked) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in method.parameters()])


def test_steps_are_those_of_a_plain_loop(shards: ShardSet) -> None:
    config = dataclasses.replace(CHANGED, dropout=0.0)
    method, plain = make(config), make(config)
    losses = run(trainer(method, shards), 24)
    data, order = training_set(plain, shards), StepSampler(18, config.training.seed, 4)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=1e-4)
    expected = []
    for step in range(24):
        batch = to_input(data.batch(order.step(step // 3)), torch.device("cpu"), POLICY)
        loss = plain.training_loss(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    assert losses == expected
    assert torch.equal(weights(method), weights(plain))
    assert losses[-1] < losses[0]
    assert method.anomalous > 24


@pytest.mark.parametrize("stop", [6, 7, 8])
def test_a_run_restored_amid_repeats_ends_with_the_same_bits(shards: ShardSet, stop: int) -> None:
    whole, other = make(CHANGED), make(CHANGED)
    losses = run(trainer(whole, shards), 24)
    begun = trainer(make(CHANGED), shards)
    assert run(begun, stop) == losses[:stop]
    buffer = io.BytesIO()
    torch.save(begun.state(), buffer)
    buffer.seek(0)
    continued = trainer(other, shards)
    continued.restore(torch.load(buffer, weights_only=True))
    assert run(continued, 24) == losses[stop:]
    assert torch.equal(weights(other), weights(whole))


# ------------------------------------------------------------------------------------------------------ the pipeline
@dataclass
class Here:
    """Runs the pipeline in this process: its actors one after the other, and one worker without Ray Train."""

    folder: Path
    jobs: list[module.Job] = field(default_factory=list)
    images: list[TrainingImages] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    def train(
        self, shards: ShardSet, config: MarkedConfig | None = None, name: str = "model", **changes: Any
    ) -> list[FitResult]:
        defaults: dict[str, Any] = {"validate_every": 0, "checkpoint_every": 10**6}
        options = TrainingOptions(shards.uri, str(self.folder / name), **{**defaults, **changes})
        return train_networks("marked", config or MarkedConfig(), options, None)  # type: ignore[arg-type]

    def learned(self, number: int = 0) -> list[str]:
        """Names of what a job learned from."""
        job, images = self.jobs[number], self.images[number]
        rows = job.shards.locate(learnable(job.categories, labels=True), ["sample_id"])
        places = zip(rows["part"].to_pylist(), rows["row"].to_pylist(), strict=True)
        names = dict(zip(places, rows["sample_id"].to_pylist(), strict=True))
        return [names[place] for place in zip(images.part.tolist(), images.row.tolist(), strict=True)]

    def work(self, job: module.Job, *rest: Any) -> None:
        self.jobs.append(job)
        self.images.append(TrainingImages.load(job.images))
        worker.work(job, self.told.append, LocalContext())


@pytest.fixture
def here(inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    made = Here(tmp_path)
    monkeypatch.setitem(METHODS, "marked", Marked)
    monkeypatch.setattr(module, "run_job_here", made.work)
    return made


def named(rows: list[list[dict[str, Any]]]) -> list[str]:
    return [row["sample_id"] for part in rows for row in part]


PLENTY = ThresholdOptions(target_fpr=0.8)
"""What two held-out normal images support."""


@pytest.mark.parametrize(
    ("data", "pixels", "features"),
    [
        (DataOptions(), True, True),
        (DataOptions(frozen_features=False), True, False),
        (DataOptions(images="stream", window=1), False, True),
        (DataOptions(images="stream", window=1, frozen_features=False), False, False),
    ],
)
def test_a_labelled_corpus_is_learned_from_however_images_come(
    here: Here, shards: ShardSet, data: DataOptions, pixels: bool, features: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[EpochIndex]] = []
    real = TrainingSet.batch

    def watched(self: TrainingSet, places: list[EpochIndex], augment: bool = True) -> TrainingBatch:
        made.append(places)
        return real(self, places, augment)

    monkeypatch.setattr(TrainingSet, "batch", watched)
    config = MarkedConfig(repeats=2)
    (result,) = here.train(shards, config, data=data, threshold=PLENTY, validate_every=15)
    (job,) = here.jobs
    assert ((job.pixels is not None), (job.features is not None)) == (pixels, features)
    assert sorted(here.learned()) == sorted(named(LABELLED))
    assert result.summary == "36 steps on 9 normal and 9 anomalous images"  # 4 epochs of 18 in batches of 4, twice each
    assert result.metrics == {"images": 18, "iterations": 36}
    assert job.iterations == 36
    assert len(made) == 18
    images = here.images[0]
    groups = [(images.part[index], images.group[index]) for places in made for epoch, index in places if epoch == 0]
    changes = sum(group != before for before, group in pairwise(groups))
    assert (changes == len(set(groups)) - 1) == (not pixels)  # one row group after the other
    assert result.threshold is not None
    assert result.threshold.n_normals == 2
    assert load_model(result.folder, CPU).provenance["training"]["anomalous"] == 9
    losses = [event["losses"]["loss"] for event in here.told if "losses" in event]
    assert losses[-1] < losses[0]
    steps = [event["step"] for event in here.told if "validation" in event]
    assert steps == [15, 30, 36]
    # two anomalous nuts of the "val" split with masks, against two normal ones
    assert all(
        event["validation"].keys() == {"image_auroc", "pixel_auroc", "pixel_ap"}
        for event in here.told
        if "validation" in event
    )
    (again,) = here.train(shards, config, data=data, threshold=PLENTY, validate_every=15)
    assert not again.fresh
    assert again.summary == result.summary


def test_a_method_without_masks_needs_none(here: Here, tmp_path: Path) -> None:
    rows = samples("nut", "train", 6) + samples("nut", "train", 4, label=1)
    (result,) = here.train(write_shards(tmp_path / "shards", [rows]), MarkedConfig(masks=False))
    assert result.metrics["images"] == 9  # one normal image is held out
    assert result.threshold is not None
    assert (result.threshold.promised, result.threshold.n_normals) == (False, 1)
    assert "the threshold promises nothing: 1 held-out normal image is too few" in result.notice


def test_a_corpus_without_any_normal_image_gives_a_model_without_a_threshold(here: Here, tmp_path: Path) -> None:
    """As of polyps."""
    rows = masked("polyp", "train", 8) + masked("polyp", "val", 3) + masked("polyp", "test", 2)
    shards = write_shards(tmp_path / "shards", [rows])
    (result,) = here.train(shards, validate_every=4)
    assert result.threshold is None
    assert "no threshold: no normal image is held out to choose it from" in result.notice
    assert result.summary == "8 steps on 0 normal and 8 anomalous images"
    told = [event["validation"] for event in here.told if "validation" in event]
    assert len(told) == 2
    assert all(figures.keys() == {"pixel_auroc", "pixel_ap"} for figures in told)
    with pytest.raises(OptionError, match=r"0 held-out normal images cannot support a false-positive rate of 0\.8"):
        here.train(shards, name="other", threshold=PLENTY)
    (silent,) = here.train(write_shards(tmp_path / "no-val", [rows[:8]]), name="silent", validate_every=4)
    assert silent.metrics["images"] == 8
    assert not [event for event in here.told[-3:] if "validation" in event]


def test_few_shots_are_drawn_of_normal_and_anomalous_images_alike(here: Here, shards: ShardSet) -> None:
    here.train(shards, few_shot=2)
    groups = [tuple(name.split("/")[1:4:2]) for name in here.learned()]
    assert {group: groups.count(group) for group in set(groups)} == {
        ("bolt", "0"): 2,
        ("bolt", "1"): 2,
        ("nut", "0"): 2,
        ("nut", "1"): 2,
    }
    options = TrainingOptions(shards.uri, "model", few_shot=5, threshold=ThresholdOptions(validation_fraction=0))
    with pytest.raises(DataError, match="cannot draw 5 shots of 'nut': it has only 4"):
        choose_samples(shards, ["bolt", "nut"], options.split, labels=True)
    few = dataclasses.replace(options, few_shot=3)
    chosen = [choose_samples(shards, ["bolt", "nut"], few.split, labels=True)[0] for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0].anomalous) == 6
    assert chosen[0].anomalous < chosen[0].learn


def test_one_model_per_category(here: Here, shards: ShardSet) -> None:
    results = here.train(shards, per_category=True)
    assert [result.metrics["images"] for result in results] == [9, 8]  # of bolts, one of five normal ones is held out
    for number, category in enumerate(("bolt", "nut")):
        assert here.jobs[number].categories == [category]
        mine = {name for name in named(LABELLED) if f"/{category}/" in name}
        assert set(here.learned(number)) == mine - here.jobs[number].held_out


TINY_UNINET = dataclasses.replace(
    TINY["uninet"].config, training=UniNetTraining(iterations=3, batch_size=4), preset="reference", mem_kernel=3
)


def test_options_of_one_category(here: Here, shards: ShardSet) -> None:
    """A model of that category alone has them; the others stay as they are."""
    changes = {"nut": {"temperature": 0.1, "training": {"encoder_learning_rate": 1e-4}}, "cog": {"margin": 0.5}}
    options = TrainingOptions(
        shards.uri, str(here.folder / "m"), per_category=True, category_options=changes, validate_every=0
    )
    train_networks("uninet", TINY_UNINET, options, None)  # type: ignore[arg-type]
    made = {c: load_model(str(here.folder / "m" / c), CPU).method.config for c in ("bolt", "nut")}
    assert made["bolt"].temperature == TINY_UNINET.temperature
    assert made["bolt"].training == TINY_UNINET.training
    assert made["nut"].temperature == 0.1
    assert made["nut"].training == dataclasses.replace(TINY_UNINET.training, encoder_learning_rate=1e-4)
    assert made["nut"].margin == TINY_UNINET.margin


@pytest.mark.parametrize(
    ("changes", "per_category", "fault"),
    [
        ({"nut": {"temperatur": 0.1}}, True, "category_options.nut: .*'temperatur'; did you mean 'temperature'"),
        ({"nut": {"temperature": -1.0}}, True, "category_options.nut: temperature=-1.0"),
        ({"nut": {"temperature": "cold"}}, True, "category_options.nut: temperature='cold'"),
        ({"nut": {"preset": "paper"}}, True, "a preset is chosen for all"),
        ({"nut": {"temperature": 0.1}}, False, "category_options of nut are for models of one category"),
    ],
)
def test_wrong_options_of_a_category_show_before_any_work(
    here: Here, shards: ShardSet, changes: dict[str, Any], per_category: bool, fault: str
) -> None:
    options = TrainingOptions(
        shards.uri, str(here.folder / "m"), per_category=per_category, category_options=changes, validate_every=0
    )
    with pytest.raises(OptionError, match=fault):
        train_networks("uninet", TINY_UNINET, options, None)  # type: ignore[arg-type]
    assert not here.jobs


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_uninet_learns_from_labels_and_masks(here: Here, shards: ShardSet, task: str) -> None:
    """Masks turn with their images, and every batch serves for two sizes."""
    config = dataclasses.replace(TINY_UNINET, task=task, contrast=None)
    if task == "segmentation":
        config = dataclasses.replace(
            config, training_sizes=(32, 64), augmentation=Augmentation(rotation=90.0), contrast="none"
        )
    options = TrainingOptions(shards.uri, str(here.folder / "m"), threshold=PLENTY, validate_every=2)
    (result,) = train_networks("uninet", config, options, None)  # type: ignore[arg-type]
    assert result.threshold is not None
    assert set(here.told[-1]) >= {"step"}
    losses = [event["losses"] for event in here.told if "losses" in event]
    assert all(loss["supervised"] > 0 for loss in losses)
    assert any("validation" in event for event in here.told)
    model = load_model(result.folder, CPU)
    assert dataclasses.replace(model.method.config, input=config.input) == config
    images = torch.randn(2, 3, model.method.input.side, model.method.input.side)
    assert torch.isfinite(model.method.predict(images).anomaly_map).all()


def test_held_out_normal_images_of_the_train_split_are_not_learned_from(here: Here, tmp_path: Path) -> None:
    rows = samples("nut", "train", 10) + masked("nut", "train", 4)
    (result,) = here.train(
        write_shards(tmp_path / "shards", [rows]),
        threshold=ThresholdOptions(target_fpr=0.8, validation_fraction=0.3),
        validate_every=11,
    )
    assert result.threshold is not None
    assert result.threshold.n_normals == 3
    assert (result.metrics["images"], len(here.learned())) == (11, 11)
    assert not here.jobs[0].held_out & set(here.learned())
    (told,) = [event["validation"] for event in here.told if "validation" in event]
    assert told.keys() == {"image_auroc", "pixel_auroc", "pixel_ap"}  # of synthetic anomalies


# ---------------------------------------------------------------------------------------------------- wrong corpora
def test_a_corpus_without_anomalous_training_images_is_refused_before_any_work(here: Here, tmp_path: Path) -> None:
    rows = samples("nut", "train", 4) + masked("nut", "test", 4) + masked("nut", "val", 2)
    rows += samples("bolt", "train", 4) + masked("bolt", "train", 4)
    shards = write_shards(tmp_path / "shards", [rows])
    message = r"has no anomalous training image of nut for a method that learns from labels; ingest"
    with pytest.raises(DataError, match=message):
        here.train(shards, categories=("nut",))
    with pytest.raises(DataError, match=message):
        here.train(shards, per_category=True)
    assert here.jobs == []
    assert not (tmp_path / "model").exists()
    (result,) = here.train(shards)
    assert sum(here.images[0].label) == 4
    assert result.categories == ["bolt", "nut"]


def test_a_category_without_any_training_image_is_refused(here: Here, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [masked("nut", "train", 4) + masked("bolt", "test", 4)])
    with pytest.raises(DataError, match="has no labelled training image of category bolt"):
        here.train(shards)


def test_missing_masks_are_told_before_any_work(here: Here, tmp_path: Path) -> None:
    unmasked = [sample("nut", "train", number, 1) for number in (7, 8)]
    shards = write_shards(tmp_path / "shards", [samples("nut", "train", 4), masked("nut", "train", 3) + unmasked])
    with pytest.raises(DataError, match=r"^set/nut/train/1/007.png \(and 1 more\) is anomalous but has no mask"):
        here.train(shards)
    assert here.jobs == []
    assert {path.name for path in tmp_path.iterdir()} == {"shards"}
    here.train(shards, MarkedConfig(masks=False))


# ---------------------------------------------------------------------------------------------------- kept features
def test_features_are_kept_by_default_where_they_take_no_more_than_prepared_pixels_may() -> None:
    method = make(MarkedConfig())
    size = 3 * (64 // 8) ** 2 * 2
    assert module.feature_bytes(method, DataOptions()) == size
    assert module.feature_bytes(method, DataOptions(feature_precision="full")) == 2 * size
    assert method.training
    most = module.ALL_PREPARED_BYTES // size
    assert module.keeps_features(method, DataOptions(), most)
    assert not module.keeps_features(method, DataOptions(), most + 1)
    assert not module.keeps_features(method, DataOptions(feature_precision="full"), most)
    assert module.keeps_features(method, DataOptions(frozen_features=True), most + 1)


def test_features_that_would_be_too_large_are_computed_in_every_step(
    here: Here, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALL_PREPARED_BYTES", 18 * 3 * 8 * 8 * 2 - 1)
    here.train(shards)
    assert (here.jobs[0].pixels, here.jobs[0].features) == (None, None)
    monkeypatch.setattr(module, "ALL_PREPARED_BYTES", 18 * 4 * 64 * 64)
    here.train(shards, name="other")
    assert here.jobs[1].pixels is not None
    assert here.jobs[1].features is not None
    assert np.isfinite(here.told[-1]["losses"]["loss"])
