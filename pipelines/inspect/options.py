"""Options of jobs/inspect_.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.runtime.options import RuntimeOptions, TrackingOptions
from unianom.configs import all_configs, has_bank
from unianom.data.image import ImageLimits
from unianom.errors import OptionError
from unianom.options import AS_WRITTEN, AtLeastZero, OpenShare, Options, Share


@dataclass(frozen=True)
class InspectOptions(Options):
    """Find the anomalies in a folder of images: learn from its normal ones, score the others, report.

    Args:
        source: folder of images, or a table or manifest of them; path or URI.
        output: folder for everything; a second run continues there. Null takes inspected/NAME in the current folder.
        methods: memory methods to compare, such as patchcore and uniformaly.
        recipes: names or files of the methods' options, one each; empty takes those with weights from Python packages.
        model: folder of a model to score with instead of fitting one: then all images of the folder are scored.
        layout: how the folder is laid out; null finds that out and says so.
        layout_options: options of the layout, by name.
        target_fpr: highest share of normal images that may fail; null takes 0.05, or what the images can support.
        max_reject_fraction: above this share of images that cannot be read the job fails, after finishing the rest.
        gallery: pictures of each category in the report; 0 shows none.
        overwrite: replace what an earlier run of another folder, or with other options, left in the output.
        limits: what an image may cost.
        runtime: workers and their CPUs.
        tracking: where MLflow records training, evaluation and report.
    """

    positional = ("source",)
    usual = ("source", "output", "methods", "recipes", "model", "layout", "layout_options", "target_fpr", "overwrite")

    source: str
    output: str | None = None
    methods: tuple[str, ...] = ("patchcore",)
    recipes: tuple[str, ...] = ()
    model: str | None = None
    layout: str | None = None
    layout_options: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    target_fpr: OpenShare | None = None
    max_reject_fraction: Share = 0.1
    gallery: AtLeastZero = 8
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    tracking: TrackingOptions = field(default_factory=lambda: TrackingOptions(enabled=False))

    def check(self) -> None:
        known = [name for name in all_configs() if has_bank(name)]
        wrong = [name for name in self.methods if name not in known]
        if wrong or not self.methods or len(set(self.methods)) < len(self.methods):
            raise OptionError(
                f"methods={list(self.methods)} must be different ones of {', '.join(known)}, which learn without "
                f"training; for the others see jobs/train.py"
            )
        if self.recipes and len(self.recipes) != len(self.methods):
            raise OptionError(f"recipes has {len(self.recipes)} entries for {len(self.methods)} methods; give one each")
        if self.layout is None and self.layout_options:
            raise OptionError("layout_options need --layout; without one both are found out")
