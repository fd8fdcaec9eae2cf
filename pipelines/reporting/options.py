"""Options of jobs/report.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.runtime.options import TrackingOptions
from unianom.errors import OptionError
from unianom.options import AtLeastZero, Options

NEEDS = (
    "a report needs either --evaluation FOLDER, or --evaluations '[FOLDER, FOLDER]', or --scores FOLDER with --shards "
    "FOLDER"
)


@dataclass(frozen=True)
class ReportOptions(Options):
    """Write one HTML file that shows whether a model works on your images.

    Give one evaluation, several of the same shard set to compare their models, or scores without an evaluation.

    Args:
        evaluation: folder that jobs/evaluate.py wrote; path or URI.
        output: the .html file to write; path or URI.
        gallery: pictures of each category: half as many defects with the lowest scores (missed ones first), half as
            many normal images with the highest, and a quarter as many typical ones of each defect type. Of scores
            without an evaluation three times as many of all images, the most anomalous first. 0 shows none.
        sections: folders in which other jobs left a section for the report (section.json and its pictures); paths or
            URIs.
        overwrite: replace another report in the output.
        tracking: where MLflow keeps a copy.
        evaluations: folders of several evaluations of one shard set, in place of `evaluation`; their models stand side
            by side.
        names: of the models, in the order of the evaluations; empty takes method, or method and backbone, or else the
            evaluations' folders.
        scores: folder that jobs/score.py wrote, in place of an evaluation; needs `shards`. For images without labels.
        shards: the shard set that was scored.
    """

    evaluation: str | None = None
    output: str = "report.html"
    gallery: AtLeastZero = 8
    sections: tuple[str, ...] = ()
    overwrite: bool = False
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    evaluations: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    scores: str | None = None
    shards: str | None = None

    def check(self) -> None:
        if not self.output.endswith(".html"):
            raise OptionError(f"output={self.output} must be a file name that ends in .html")
        given = [self.evaluation is not None, bool(self.evaluations), self.scores is not None]
        if sum(given) > 1:
            raise OptionError(f"{NEEDS}; several of them are given")
        if (self.scores is None) != (self.shards is None):
            raise OptionError("--scores and --shards go together: give both, or an evaluation, which names its own")
        if len(set(self.evaluations)) < len(self.evaluations):
            raise OptionError("an evaluation is given twice; give each once")
        if self.names and (len(self.names) != self.count or len(set(self.names)) < self.count):
            raise OptionError(f"names={list(self.names)} must be {self.count} different names, one for each evaluation")

    def check_given(self) -> None:
        """Refuse options that name nothing to report; apart from `check`, so that defaults can be printed.

        Raises:
            OptionError: neither evaluations nor scores are given.
        """
        if self.evaluation is None and not self.evaluations and self.scores is None:
            raise OptionError(f"{NEEDS}; none of them is given")

    @property
    def count(self) -> int:
        """Number of columns of the report: evaluations, or one set of scores."""
        return len(self.evaluations) or 1
