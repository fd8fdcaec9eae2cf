"""Training: steps, checkpoints and what disturbs them. Most of it in this process, without Ray."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch import Tensor

import unianom
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from pipelines.training.driver import keeps_features
from pipelines.training.loader import BatchLoader
from pipelines.training.options import DataOptions, Phase, ThresholdOptions, TrainingOptions, train_options
from pipelines.training.ray_training import check_resources
from pipelines.training.report import TrainingReport
from pipelines.training.sampler import EpochIndex, StepSampler
from pipelines.training.train import train
from pipelines.training.trainer import Trainer, evaluation_mode, phase_configs
from pipelines.training.worker import fixed_places
from tests.methods.conftest import RECONSTRUCTION, TINY, random_images, training_batch
from tests.pipelines.conftest import ONE, UNTRACKED, Small, kill_job, without_ray
from unianom.configs.onenip import OneNIPConfig
from unianom.configs.synthesis import SynthesisConfig
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.configs.uniad import UniADConfig
from unianom.configs.uninet import UniNetTraining
from unianom.errors import DataError, OptionError
from unianom.methods import METHODS
from unianom.methods.onenip import OneNIP
from unianom.methods.trained import TrainedMethod, TrainingBatch
from unianom.methods.uniad import UniAD
from unianom.methods.unias import UniAS
from unianom.options import flatten, to_plain

REPOSITORY = Path(__file__).parents[3]

STILL = dataclasses.replace(RECONSTRUCTION["transformer"], dropout=0.0, jitter_probability=0.0)
"""A transformer without anything random, so that the same images give the same gradients."""


class Fixed:
    """Twelve images and what belongs to them, in place of a corpus."""

    def __init__(self, method: TrainedMethod) -> None:
        self.method = method
        self.whole = training_batch(method, 12)

    def batch(self, places: list[EpochIndex]) -> TrainingBatch:
        chosen = torch.tensor([index for _, index in places])
        return self.whole.map(lambda tensor: tensor[chosen])


def make(config: Any, seed: int = 0) -> TrainedMethod:
    torch.manual_seed(seed)
    return {UniADConfig: UniAD, OneNIPConfig: OneNIP}[type(config)](config)


def trainer(method: TrainedMethod, rank: int = 0, workers: int = 1, **options: Any) -> Trainer:
    training = method.config.training
    order = StepSampler(12, training.seed, training.batch_size, rank, workers)
    batches = BatchLoader(Fixed(method), order, 0, pin=False)  # type: ignore[arg-type]
    return Trainer(method, batches, 12, order.share, **options)


def weights(method: TrainedMethod) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in method.parameters() if parameter.requires_grad])


def run(steps: Trainer, end: int) -> list[float]:
    return [float(told["losses"]["loss"]) for told in steps.steps(end)]


CONFIG = UniADConfig(
    **RECONSTRUCTION, neighbours=3, training=TrainingConfig(iterations=12, batch_size=4, learning_rate=1e-3)
)
"""With dropout and jitter: a run that lost its random state would differ."""


# ------------------------------------------------------------------------------------------------------------- steps
def test_a_restored_run_ends_with_the_same_bits() -> None:
    whole = make(CONFIG)
    first = trainer(whole)
    losses = run(first, 12)
    assert losses[-1] < losses[0]

    begun = trainer(make(CONFIG))
    assert run(begun, 5) == losses[:5]
    buffer = io.BytesIO()
    torch.save(begun.state(), buffer)
    run(begun, 7)  # steps that a crash throws away
    buffer.seek(0)
    other = make(CONFIG, seed=99)
    continued = trainer(other)
    continued.restore(torch.load(buffer, weights_only=True))
    assert continued.step == 5
    assert run(continued, 12) == losses[5:]
    assert torch.equal(weights(other), weights(whole))


def test_a_run_of_two_workers_continues_on_one() -> None:
    begun = trainer(make(CONFIG))
    run(begun, 5)
    state = begun.state()
    state["random"] *= 2
    losses = []
    for _ in range(2):
        continued = trainer(make(CONFIG, seed=99))
        continued.restore(copy.deepcopy(state))
        losses.append(run(continued, 12))
    assert len(losses[0]) == 7
    assert losses[0] == losses[1], "a new random state must be the same in every attempt"


def test_what_happens_in_between_does_not_change_the_run() -> None:
    plain, looked_at = make(CONFIG), make(CONFIG)
    losses = run(trainer(plain), 6)
    steps = trainer(looked_at)
    seen = []
    for told in steps.steps(6):
        seen.append(float(told["losses"]["loss"]))
        with evaluation_mode(looked_at):
            assert not looked_at.training
            looked_at.predict(random_images(2))
            torch.rand(7)
        assert looked_at.training
    assert seen == losses
    assert torch.equal(weights(plain), weights(looked_at))


def test_accumulated_passes_equal_one_pass() -> None:
    still = dataclasses.replace(CONFIG, transformer=STILL)
    whole, parts = make(still), make(still)
    run(trainer(whole), 3)
    run(trainer(parts, accumulate=3), 3)  # parts of 1, 1 and 2 images
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(whole), weights(make(still)))


def test_schedule_and_clipping_are_the_methods_own() -> None:
    training = dataclasses.replace(CONFIG.training, decay_at=(0.5,), clip_norm=1e-3)
    method = make(dataclasses.replace(CONFIG, training=training))
    steps = trainer(method)
    rates = []
    for _ in steps.steps(12):
        norm = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).norm()
        assert norm <= 1.001e-3
        rates.append(steps.state()["optimisers"][0]["param_groups"][0]["lr"])
    # after a step the rate is that of the next one: the seventh of twelve is the first behind one half
    np.testing.assert_allclose(rates, [1e-3] * 5 + [1e-4] * 7)


def phases(config: Any, *changes: tuple[int, dict[str, Any]]) -> list[tuple[int, Any]]:
    told = [Phase(step / 12, change) for step, change in changes]
    return phase_configs(make(config).config, told, UniAD, 12)


def test_a_phase_takes_the_schedule_where_it_is() -> None:
    training = dataclasses.replace(CONFIG.training, decay_at=(0.5,))
    method = make(dataclasses.replace(CONFIG, training=training))
    steps = trainer(method, phases=phases(method.config, (3, {"training.learning_rate": 5e-3})))
    rates = [steps.state()["optimisers"][0]["param_groups"][0]["lr"] for _ in steps.steps(12)]
    # told after each step: that of the fourth is the first of the phase, and the schedule goes on
    np.testing.assert_allclose(rates, [1e-3] * 3 + [5e-3] * 2 + [5e-4] * 7)
    assert method.config.training.learning_rate == 5e-3


@pytest.mark.parametrize("end", [3, 4, 5, 8, 9])
def test_a_run_with_phases_continues_to_the_same_bits(end: int) -> None:
    """Before, at and behind the steps at which options change."""
    changes = ((4, {"training.learning_rate": 3e-3}), (8, {"training.weight_decay": 0.3}))
    whole = make(CONFIG)
    losses = run(trainer(whole, phases=phases(CONFIG, *changes)), 12)
    assert not torch.equal(weights(whole), weights(trained_plainly()))
    begun = trainer(make(CONFIG), phases=phases(CONFIG, *changes))
    assert run(begun, end) == losses[:end]
    state = copy.deepcopy(begun.state())
    other = make(CONFIG, seed=99)
    continued = trainer(other, phases=phases(CONFIG, *changes))
    continued.restore(state)
    assert run(continued, 12) == losses[end:]
    assert torch.equal(weights(other), weights(whole))


def trained_plainly() -> TrainedMethod:
    method = make(CONFIG)
    run(trainer(method), 12)
    return method


def test_a_phase_that_begins_later_is_another_run_until_then_the_same() -> None:
    """A state is taken over where phases differ only from there on: what a population does."""
    early = trainer(make(CONFIG), phases=phases(CONFIG, (4, {"training.learning_rate": 3e-3})))
    run(early, 8)
    state = copy.deepcopy(early.state())
    followed = ((4, {"training.learning_rate": 3e-3}), (8, {"training.learning_rate": 1e-4}))
    other = make(CONFIG, seed=99)
    continued = trainer(other, phases=phases(CONFIG, *followed))
    continued.restore(state)
    losses = run(continued, 12)
    whole = make(CONFIG)
    assert run(trainer(whole, phases=phases(CONFIG, *followed)), 12)[8:] == losses
    assert torch.equal(weights(other), weights(whole))


def test_phases_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match=r"neighbours cannot change while .*training.learning_rate"):
        phases(CONFIG, (3, {"neighbours": 0}))
    with pytest.raises(OptionError, match="ascending"):
        TrainingOptions("s", "m", phases=(Phase(0.5, {"a": 1}), Phase(0.5, {"b": 1})))
    for start in (0.0, 1.0):
        with pytest.raises(OptionError, match=rf"^start={start} must be in \(0, 1\)$"):
            Phase(start, {"a": 1})
    with pytest.raises(OptionError, match=r"^method must name an option that changes$"):
        Phase(0.5, {})
    for name, method in METHODS.items():
        if issubclass(method, TrainedMethod):
            plain = flatten(to_plain(TINY[name].config))
            assert set(method.schedulable_options) <= set(plain), name


def test_bf16_trains_close_to_fp32() -> None:
    still = dataclasses.replace(CONFIG, transformer=STILL)
    losses = run(trainer(make(still)), 12)
    rounded = run(trainer(make(still), precision="bf16"), 12)
    np.testing.assert_allclose(rounded, losses, rtol=0.05)
    assert rounded != losses


def test_a_batch_smaller_than_workers_and_parts_is_refused() -> None:
    with pytest.raises(OptionError, match=r"batch_size=4 on 1 workers .* at least 5"):
        trainer(make(CONFIG), accumulate=5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ddp_worker(rank: int, port: int, configs: list[Any], output: str) -> None:
    """One of two workers: three steps of each, the model finished on the first one after each, as validation does."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for number, config in enumerate(configs):
        method = make(config)
        steps = trainer(method, rank, 2)
        for _ in steps.steps(3):
            if rank == 0:
                with evaluation_mode(method):
                    method.finalize([training_batch(method, 4)], ["a", "b"])
        state = steps.state()
        if rank == 0:
            torch.save({"weights": weights(method), "random": len(state["random"])}, f"{output}{number}")
    torch.distributed.destroy_process_group()


def test_two_workers_step_as_one_on_the_whole_batch(tmp_path: Path) -> None:
    """Of two methods, in the same processes, since starting these takes longest."""
    training = dataclasses.replace(CONFIG.training, batch_size=5)  # shares of 2 and 3 images
    configs = [
        dataclasses.replace(CONFIG, transformer=STILL, training=training),
        OneNIPConfig(**{**RECONSTRUCTION, "transformer": STILL}, refiner=False, training=training),
    ]
    mp.spawn(ddp_worker, (free_port(), configs, str(tmp_path / "state")), nprocs=2)
    for number, config in enumerate(configs):
        alone = make(config)
        run(trainer(alone), 3)
        state = torch.load(tmp_path / f"state{number}", weights_only=True)
        assert state["random"] == 2
        torch.testing.assert_close(state["weights"], weights(alone), rtol=1e-3, atol=2e-5)


def test_finishing_sees_every_category_alike() -> None:
    category = np.array([0, 0, 0, 0, 1, 2, 2])
    assert fixed_places(category, 5) == [(-1, 0), (-1, 4), (-1, 5), (-1, 1), (-1, 6)]
    assert fixed_places(category, 0) == []


# ----------------------------------------------------------------------------------------------------------- options
def test_features_are_kept_where_images_stay_as_they_are() -> None:
    plain = UniAS(TINY["unias"].config)
    flipped = UniAS(dataclasses.replace(TINY["unias"].config, augmentation=Augmentation(horizontal=("*",))))
    assert keeps_features(plain, DataOptions(), 9)
    assert not keeps_features(plain, DataOptions(frozen_features=False), 9)
    assert not keeps_features(flipped, DataOptions(), 9)
    with pytest.raises(OptionError, match="augmentation"):
        keeps_features(flipped, DataOptions(frozen_features=True), 9)
    nearest = OneNIP(dataclasses.replace(TINY["onenip"].config, prompt_sampling="nearest"))
    with pytest.raises(OptionError, match="nearest"):
        keeps_features(nearest, DataOptions(frozen_features=False), 9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": 0},
        {"checkpoint_every": 0},
        {"validate_every": -1},
        {"validation_images": 1},
        {"max_failures": -1},
        {"min_workers": 2},
        {"min_workers": 0},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        TrainingOptions("shards", "model", **wrong)


# ------------------------------------------------------------------------------------------------------ the pipeline
def options(name: str, small: Small, output: Path, config: Any, **changes: Any) -> Any:
    defaults: dict[str, Any] = {
        "method": config,
        "tracking": UNTRACKED,
        "runtime": ONE,
        "threshold": ThresholdOptions(target_fpr=0.5, validation_fraction=0.3),
        "checkpoint_every": 4,
        "validate_every": 0,
    }
    return train_options()[name](shards=str(small.shards), output=str(output), **{**defaults, **changes})


def test_uninet_goes_from_training_to_scores_with_and_without_batch_norm_folded(
    inline: None, small: Small, tmp_path: Path
) -> None:
    """Its frozen teacher's features are kept, its other teacher sees the images."""
    config = dataclasses.replace(TINY["uninet"].config, training=UniNetTraining(iterations=4, batch_size=4))
    train(options("uninet", small, tmp_path / "model", config))
    assert list((tmp_path / "prepared").rglob("*-level_2.npy"))
    assert list((tmp_path / "prepared").rglob("*-pixels.npy"))
    scores = {}
    for fold in (True, False):
        folder = str(tmp_path / f"scores-{fold}")
        given = ScoreOptions(
            str(tmp_path / "model"), str(small.shards), output=folder, fold_batch_norm=fold, runtime=ONE
        )
        table = score(given).scores.table(columns=["sample_id", "score"])
        scores[fold] = dict(zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    assert scores[True].keys() == scores[False].keys()
    assert scores[True] == pytest.approx(scores[False], rel=1e-4)
    assert scores[True] != scores[False], "nothing was folded"


def test_wrong_inputs_show_before_any_work(inline: None, small: Small, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY["onenip"].config, synthesis=SynthesisConfig(textures=str(tmp_path / "dtd")))
    with pytest.raises(DataError, match=r"synthesis\.textures: no folder .*dtd"):
        train(options("onenip", small, tmp_path / "model", config))
    with pytest.raises(DataError, match="no category nut; it has cog, weave"):
        train(options("uniad", small, tmp_path / "other", CONFIG, categories=("nut",)))
    assert not (tmp_path / "prepared").exists()


# ---------------------------------------------------------------------------------------------------------- with Ray
HERE_ALONE = RuntimeOptions(local=True, workers=1)
LONG = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, iterations=400))


@pytest.fixture(scope="module")
def undisturbed_model(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one worker in this process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with without_ray():
        result = train(options("uniad", small, folder, LONG, checkpoint_every=150))[0]
    assert result.fresh
    assert result.metrics["iterations"] == 400
    assert result.threshold is not None
    return folder


def test_an_interrupted_training_here_ends_with_the_same_weights(
    small: Small, undisturbed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C behind the checkpoint of step 150, in a job without Ray, then the same command."""
    shown: list[int] = []
    put = TrainingReport.put

    def interrupt(report: TrainingReport, event: dict[str, Any]) -> None:
        put(report, event)
        shown.append(event["step"])
        if event["step"] >= 200:
            raise KeyboardInterrupt

    given = options("uniad", small, tmp_path / "model", LONG, checkpoint_every=150, runtime=HERE_ALONE)
    monkeypatch.setattr(TrainingReport, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(given)
    monkeypatch.setattr(TrainingReport, "put", lambda report, event: (put(report, event), shown.append(event["step"])))
    interrupted = len(shown)
    assert train(given)[0].fresh
    assert shown[interrupted] == 150, "it continues at the checkpoint"
    assert shown[-1] == 400
    assert same_weights(tmp_path / "model", undisturbed_model)
    assert (tmp_path / "model" / "model.json").read_bytes() == (undisturbed_model / "model.json").read_bytes()


def checkpoints(output: Path) -> set[str]:
    """Those that Ray Train knows of, and so continues from."""
    try:
        known = (output / "_work" / "checkpoints" / "checkpoint_manager_snapshot.json").read_text()
    except FileNotFoundError:
        return set()
    return set(re.findall(r"checkpoint_[\d_.-]+", known))


def same_weights(left: Path, right: Path) -> bool:
    return (left / "weights.safetensors").read_bytes() == (right / "weights.safetensors").read_bytes()


@pytest.mark.ray
def test_a_killed_job_and_a_killed_worker_end_with_the_same_weights(
    ray_cluster: None, undisturbed_model: Path, small: Small, capfd: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of driver, cluster and workers behind a checkpoint, then of a worker of the job that continues it."""
    output = undisturbed_model.parent / "killed"
    on_ray = RuntimeOptions(workers=1, local=False)
    asked = options("uniad", small, output, LONG, checkpoint_every=20, runtime=on_ray)
    config = undisturbed_model.parent / "killed.yaml"
    config.write_text(yaml.safe_dump(to_plain(asked)))
    process = subprocess.Popen([sys.executable, "jobs/train.py", "uniad", "--config", str(config)], cwd=REPOSITORY)
    deadline = time.monotonic() + 180
    while not checkpoints(output):
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_job(process)
    assert not (output / "model.json").exists()
    left = checkpoints(output)
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if checkpoints(output) - left:
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    result = train(asked)[0]
    killer.join()
    assert killed
    assert result.fresh
    assert capfd.readouterr().err.count("continuing at step") == 2
    assert same_weights(output, undisturbed_model)
    assert unianom.load(output).threshold == unianom.load(undisturbed_model).threshold
    assert not (output / "_work").exists()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert not train(asked)[0].fresh
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.ray
def test_two_workers_train_onenip_with_prompts_synthesis_and_validation(
    ray_cluster: None, undisturbed_model: Path, small: Small, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also: the frozen features that UniAD's run kept serve this one, since both have the same neck."""
    output = undisturbed_model.parent / "onenip"
    prepared = undisturbed_model.parent / "prepared"
    kept = {path: path.stat().st_mtime_ns for path in prepared.rglob("*-neck.npy")}
    assert kept
    config = dataclasses.replace(TINY["onenip"].config, training=CONFIG.training)
    two = RuntimeOptions(workers=2)
    store = TrackingOptions(mlflow_uri=f"sqlite:///{undisturbed_model.parent}/mlflow.db")
    train(options("onenip", small, output, config, runtime=two, validate_every=6, tracking=store))
    told = capfd.readouterr().err
    assert "validation image_auroc" in told
    assert "12/12 steps" in told
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*-neck.npy")} == kept
    model = unianom.load(output)
    assert model.categories == ["cog", "weave"]
    assert sorted(model.method.prompt_category.tolist()) == [0, 1]
    images = [str(path) for path in sorted((small.corpus / "cog" / "test" / "good").iterdir())[:2]]
    assert all(np.isfinite(result.anomaly_map).all() for result in model.predict(images))

    client = mlflow.MlflowClient(store.mlflow_uri)
    (recorded,) = client.search_runs([client.get_experiment_by_name("unianom").experiment_id])
    assert recorded.data.params["method.refiner"] == "true"
    told_at = {
        name: [metric.step for metric in client.get_metric_history(recorded.info.run_id, name)]
        for name in ("loss", "loss/segmentation", "images_per_second", "data_share", "validation/image_auroc")
    }
    assert told_at["loss"][-1] == 12
    assert told_at["loss/segmentation"] == told_at["images_per_second"] == told_at["data_share"] == told_at["loss"]
    assert told_at["validation/image_auroc"] == [6, 12]


@pytest.mark.ray
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    ray_cluster: None, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once: what only the user can mend is not tried again. Here images are streamed and encoded every step."""
    training = TrainingConfig(iterations=40, batch_size=4, learning_rate=1e30, clip_norm=None)
    config = dataclasses.replace(CONFIG, training=training)
    streamed = DataOptions(images="stream", frozen_features=False, folder=str(tmp_path / "prepared"))
    with pytest.raises(DataError, match=r"not finite at step \d+ .*learning_rate"):
        train(options("uniad", small, tmp_path / "model", config, data=streamed))
    assert not (tmp_path / "prepared").exists()


@pytest.mark.ray
def test_workers_that_do_not_fit_are_refused(ray_cluster: None, small: Small, tmp_path: Path) -> None:
    crowd = RuntimeOptions(workers=64)
    with pytest.raises(OptionError, match=r"64 workers .* do not fit"):
        check_resources(TrainingOptions(str(small.shards), str(tmp_path), runtime=crowd))
