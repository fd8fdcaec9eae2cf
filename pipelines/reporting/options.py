"""Options of jobs/report.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.runtime.options import TrackingOptions
from unianom.errors import OptionError
from unianom.options import AtLeastZero, Options


@dataclass(frozen=True)
class ReportOptions(Options):
    """Write an evaluation as one HTML file: tables, curves, score histograms and a gallery of heat maps.

    Args:
        evaluation: folder that jobs/evaluate.py wrote; path or URI.
        output: the .html file to write; path or URI.
        sections: folders in which other jobs left a section for the report (section.json and its pictures); paths or
            URIs.
        gallery: pictures of the worst misses, and of the worst false alarms; half as many of each category, and a
            quarter as many typical ones of each defect type. 0 shows none.
        overwrite: replace another report in the output.
        tracking: where MLflow keeps a copy.
    """

    evaluation: str
    output: str
    gallery: AtLeastZero = 8
    sections: tuple[str, ...] = ()
    overwrite: bool = False
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        if not self.output.endswith(".html"):
            raise OptionError(f"output={self.output} must be a file name that ends in .html")
