"""Training a method on one or many workers: prepared data → steps → threshold → model folder.

    shards ─▶ pixels or frozen features, once ─▶ workers: batches, steps, checkpoints ─▶ trained model ─▶ scores of
    held-out normals ─▶ threshold ─▶ model folder

A run is a pure function of its options on one CPU worker: killed anywhere and started again with the same command, it
ends with the same weights. Ray Train keeps the checkpoints and restarts workers from the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from pipelines.data.reader import missing_masks
from pipelines.data.splits import LEFT_OUT, TrainValSplit, choose_samples, held_out_record
from pipelines.runtime.models import load_model
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import scope
from pipelines.training.job import Job, make_method, synthesiser_of, wants_pixels
from pipelines.training.local_training import run_job_here, trains_here
from pipelines.training.options import WORK, DataOptions, TrainingOptions
from pipelines.training.per_category import FitResult, FitTask, fit_all, open_models, plan_fits, weights_digest
from pipelines.training.prepared import feature_names, learnable, prepare_features, prepare_pixels
from pipelines.training.samples import TrainingImages
from pipelines.training.threshold import score_held_out, set_thresholds
from pipelines.training.trainer import evaluation_mode
from unianom import files
from unianom.data.schema import ANOMALOUS
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU
from unianom.methods.trained import TrainedMethod
from unianom.model import Model, is_model, versions
from unianom.options import to_plain

ALL_PREPARED_BYTES = 32 << 30
"""Up to this size prepared images are kept, and frozen features; beyond it they are made anew in every epoch."""


def train_networks(name: str, config: Any, options: TrainingOptions, run: Run) -> list[FitResult]:
    """Train one model for all categories, or one each.

    Args:
        name: a trained method.
        config: its options.
        options: data, output and the rest.
        run: where losses and validations are recorded.

    Raises:
        DataError, OptionError, WeightsError: wrong inputs; nothing is lost, the same command continues.
    """
    tasks = plan_trainings(name, config, options)
    with open_models(tasks, options):
        return train_planned(name, tasks, options, run)


def plan_trainings(name: str, config: Any, options: TrainingOptions) -> list[FitTask]:
    """Plan what `train_networks` trains; arguments and errors are the same."""
    if options.threshold.source == LEFT_OUT:
        raise OptionError(
            f"threshold.source={LEFT_OUT} is for methods with a memory bank, and {name} has none; take held_out, or "
            f"leave it out"
        )
    batch_spec = make_method(name, config).batch_spec
    weights = cache(weights_digest)

    def describe(own: Any, shards: ShardSet, categories: list[str]) -> tuple[TrainValSplit, str, dict[str, Any]]:
        own_spec = batch_spec if own == config else make_method(name, own).batch_spec
        chosen, notice = choose_samples(shards, categories, options.split, validate=True, labels=own_spec.labels)
        if own_spec.masks:
            check_masks(shards, categories)
        plan = {
            "method": name,
            "config": to_plain(own),
            "shards": shards.digest,
            "categories": categories,
            "few_shot": options.few_shot,
            "seed": options.seed,
            "threshold": to_plain(options.threshold),
            "limits": to_plain(options.limits),
            "precision": options.precision,
            "accumulate": options.accumulate,
            "frozen_features": options.data.frozen_features,
            "feature_precision": options.data.feature_precision,
            "images": options.data.images,
            "window": options.data.window,
            **options.runtime.execution.plan,
            "weights": weights(own.backbone.name, own.backbone.weights),
            **({"phases": to_plain(options.phases)} if options.phases else {}),
        }
        return chosen, notice, plan

    return plan_fits(config, options, describe, batch_spec.labels)


def train_planned(name: str, tasks: Sequence[FitTask], options: TrainingOptions, run: Run) -> list[FitResult]:
    """Train what `plan_trainings` planned, in folders that are claimed."""
    return fit_all(tasks, options, partial(_train, name, options, run))


def _train(name: str, options: TrainingOptions, run: Run, task: FitTask, digest: str) -> FitResult:
    config, shards, categories, output = task.config, task.shards, task.categories, task.output
    chosen, notice = task.chosen, task.notice
    if is_model(output):
        return _result(load_model(output, CPU), output, fresh=False)
    batch_spec = make_method(name, config).batch_spec
    prefix = f"{scope(categories[0])}/" if options.per_category else ""
    work = files.join(output, WORK)
    trained = files.join(work, "trained")
    if not is_model(trained):
        here = trains_here(options, len(chosen.learn))
        job = plan_job(name, config, options, shards, categories, chosen, work)
        if here:
            run_job_here(job, options, work, run, prefix)
        else:
            from pipelines.runtime.actors import connect
            from pipelines.training.ray_training import run_job

            connect(options.runtime)
            run_job(job, options, work, run, prefix)
    model = load_model(trained, CPU)
    final = Model(model.method, categories)
    if chosen.held_out:
        normals = score_held_out(trained, shards, chosen.held_out, categories, options, files.join(work, "held_out"))
        set_thresholds(final, normals, options.threshold)
    provenance = {
        "plan_digest": digest,
        "shards": {"digest": shards.digest},  # not where they lie: a copy elsewhere makes the same model
        "training": {
            "images": len(chosen.learn),
            "anomalous": len(chosen.anomalous),
            "iterations": config.training.steps(len(chosen.learn), batch_spec.repeats),
            "workers": options.workers,
            "precision": options.precision,
            "phases": to_plain(options.phases),
        },
        "held_out_normals": len(chosen.held_out),
        "held_out": held_out_record(shards, categories, options.split),
        "notice": notice,
        "seeds": {"split": options.seed, "training": config.training.seed},
        "few_shot": options.few_shot,
        **options.runtime.execution.plan,
        "versions": versions(),
    }
    final.provenance = provenance
    final.save(output)
    files.remove(work)
    return _result(final, output, fresh=True)


def _result(model: Model, output: str, fresh: bool) -> FitResult:
    made = model.provenance["training"]
    anomalous = made.get("anomalous", 0)  # models of before have none
    kinds = f"{made['images'] - anomalous} normal" + (f" and {anomalous} anomalous" if anomalous else "")
    return FitResult(
        folder=output,
        categories=model.categories,
        fresh=fresh,
        summary=f"{made['iterations']} steps on {kinds} images",
        metrics={"images": made["images"], "iterations": made["iterations"]},
        threshold=model.threshold,
        category_thresholds=model.category_thresholds,
        notice=model.provenance["notice"],
    )


def plan_job(
    name: str,
    config: Any,
    options: TrainingOptions,
    shards: ShardSet,
    categories: list[str],
    chosen: TrainValSplit,
    work: str,
) -> Job:
    """Prepare what is computed once, and write down which images are learned from."""
    method = make_method(name, config)
    batch_spec = method.batch_spec
    images = TrainingImages.choose(shards, categories, chosen.learn, batch_spec.labels)
    places = files.join(work, "images.parquet")
    images.save(places)
    job = Job(
        name=name,
        config=to_plain(config),
        shards=shards,
        categories=categories,
        images=places,
        held_out=chosen.held_out,
        pixels=None,
        features=None,
        feature_names=(),
        iterations=config.training.steps(len(images), batch_spec.repeats),
        output=files.join(work, "trained"),
        options=options,
    )
    job.phases()  # wrong options, and
    synthesiser_of(method)  # a wrong folder of textures shows now, before hours of work
    folder = files.full_uri(options.data.folder or files.beside(options.output, "prepared"))
    selection = learnable(categories, batch_spec.labels)
    rows = shards.count(selection)
    features = keeps_features(method, options.data, rows)
    if features:
        made = prepare_features(
            shards,
            categories,
            selection,
            method,
            weights_digest(config.backbone.name, config.backbone.weights),
            options.data.feature_precision == "half",
            folder,
            options.limits,
            options.runtime,
            options.batch_size,
        )
        job = replace(job, features=made.uri, feature_names=feature_names(made))
    size = rows * (4 if batch_spec.masks else 3) * method.input.side**2
    keep_pixels = options.data.images == "prepared" or (options.data.images is None and size <= ALL_PREPARED_BYTES)
    if keep_pixels and wants_pixels(batch_spec, features):
        runtime = replace(options.runtime, gpus_per_worker=0, stages="fused")
        made = prepare_pixels(shards, selection, method.input, folder, options.limits, runtime, batch_spec.masks)
        job = replace(job, pixels=made.uri)
    return job


def check_masks(shards: ShardSet, categories: list[str]) -> None:
    """Refuse anomalous training images without a mask, before any work.

    Raises:
        DataError: there are some; names the first.
    """
    without: list[str] = []
    for part in shards.parts:
        for batch in shards.read(part, Selection(("train",), tuple(categories), (ANOMALOUS,)), ["sample_id", "mask"]):
            without += batch.filter(batch["mask"].is_null())["sample_id"].to_pylist()
    if without:
        raise DataError(missing_masks(without))


def keeps_features(method: TrainedMethod, data: DataOptions, images: int) -> bool:
    """Return whether frozen features are computed once.

    Args:
        method: whose features.
        data: what is asked for.
        images: how many there are to keep features of.

    Raises:
        OptionError: they are asked for where augmentation makes that impossible, or not, where prompts need them.
    """
    augmented = method.batch_spec.augmentation.active
    if data.frozen_features and augmented:
        raise OptionError(
            "data.frozen_features needs images that do not change; empty method.augmentation, or leave it out"
        )
    features = data.frozen_features
    if features is None:
        features = not augmented and images * feature_bytes(method, data) <= ALL_PREPARED_BYTES
    if method.batch_spec.prompts == "nearest" and not features:
        raise OptionError("prompts by nearest features need --data.frozen_features true")
    return features


def feature_bytes(method: TrainedMethod, data: DataOptions) -> int:
    """Return what the frozen features of an image take, from a forward pass of one."""
    side = method.input.side
    with evaluation_mode(method), torch.inference_mode():
        features = method.frozen_features(torch.zeros(1, 3, side, side, device=method.device))
    return sum(value.numel() for value in features.values()) * (2 if data.feature_precision == "half" else 4)
