"""The whole chain on a drawn corpus: what `make demo` runs, offline and without a GPU."""

from __future__ import annotations

import time
from pathlib import Path

from pipelines.data.ingest import ingest
from pipelines.data.options import IngestOptions
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.options import EvaluateOptions
from pipelines.inference.options import ScoreOptions
from pipelines.inference.score import score
from pipelines.reporting.evaluation_report import print_evaluation
from pipelines.reporting.html import write_report
from pipelines.reporting.options import ReportOptions
from pipelines.runtime import outputs
from pipelines.runtime.cli import console
from pipelines.runtime.mlflow_store import sqlite_uri
from pipelines.runtime.options import DemoOptions
from pipelines.training.options import ThresholdOptions, TrainJobOptions, train_options
from pipelines.training.train import train
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.data.drawing import draw_corpus
from unianom.data.image import InputPolicy

REGISTERED = "unianom-demo"


def run_demo(options: DemoOptions) -> None:
    """Run every step as its job would, saying the command of each."""
    start = time.monotonic()
    root = Path(options.output).absolute()
    paths = {name: str(root / name) for name in ("corpus", "shards", "model", "scores", "evaluation")}
    report = str(root / "report.html")

    plan = {"weights": options.weights, "backbone": options.backbone, "seed": options.seed}
    with outputs.open_output(str(root), "demo", plan):
        _run(options, root, paths, report)
    console.print(f"time:    {time.monotonic() - start:.0f} s")


def _run(options: DemoOptions, root: Path, paths: dict[str, str], report: str) -> None:
    """Run every step in the claimed folder."""
    _say("1/6 draw a corpus in MVTec AD layout", None)
    draw_corpus(paths["corpus"], train=60, seed=options.seed)

    _say("2/6 ingest", f"ingest.py --layout mvtec --source {paths['corpus']} --output {paths['shards']}")
    ingest(IngestOptions("mvtec", paths["corpus"], paths["shards"], runtime=options.runtime))

    command = f"train.py uniformaly --shards {paths['shards']} --output {paths['model']} …"
    _say("3/6 fit UniFormaly and register it", command)
    results = train(_train_options(options, paths))
    for result in results:
        console.print(result.summary)

    _say("4/6 score", f"score.py --model {paths['model']} --shards {paths['shards']} --output {paths['scores']}")
    score(ScoreOptions(paths["model"], paths["shards"], paths["scores"], runtime=options.runtime))

    command = f"evaluate.py --scores {paths['scores']} --shards {paths['shards']} --output {paths['evaluation']}"
    _say("5/6 evaluate", command)
    content = evaluate(EvaluateOptions(paths["scores"], paths["shards"], paths["evaluation"], runtime=options.runtime))

    _say("6/6 report", f"report.py --evaluation {paths['evaluation']} --output {report}")
    write_report(ReportOptions(paths["evaluation"], report))

    console.print()
    print_evaluation(content)
    if options.weights == "random":
        console.print(
            "The encoder's weights are random, since the demo needs no download: these figures show that the chain "
            "works, not how good the method is. With weights of your own: jobs/demo.py --weights FILE"
        )
    console.print(f"\nreport:  {report}")
    console.print(f"MLflow:  mlflow ui --backend-store-uri {sqlite_uri(root / 'mlflow.db')}")
    console.print(f"model:   unianom.load('{paths['model']}'), registered as models:/{REGISTERED}@candidate")


def _train_options(options: DemoOptions, paths: dict[str, str]) -> TrainJobOptions:
    method = UniFormalyConfig(
        backbone=BackboneConfig(options.backbone, weights=options.weights),
        input=InputPolicy(resize="stretch", size=224, crop=None),
        bank=BankConfig(coreset_ratio=0.05),
    )
    return train_options()["uniformaly"](
        shards=paths["shards"],
        output=paths["model"],
        threshold=ThresholdOptions(validation_fraction=0.3),
        runtime=options.runtime,
        method=method,
        register_as=REGISTERED,
    )


def _say(title: str, command: str | None) -> None:
    console.print(f"\n{title}", style="bold")
    if command:
        console.print(f"  python jobs/{command}")
