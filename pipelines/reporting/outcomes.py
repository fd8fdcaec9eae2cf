"""What became of the images: found, missed, passed, flagged wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unianom.data.schema import ANOMALOUS, NORMAL

VERDICTS = {
    (ANOMALOUS, "pass"): "missed",
    (ANOMALOUS, "fail"): "found",
    (NORMAL, "fail"): "false alarm",
    (NORMAL, "pass"): "passed",
    (-1, "fail"): "flagged",
    (-1, "pass"): "passed",
}


def verdict(label: int, decision: str | None) -> str:
    """Return what became of a sample, in a word or two: "missed", "found", "false alarm", "passed", "flagged" (no
    label), "review", or "" without a decision."""
    return decision if decision == "review" else VERDICTS.get((label, decision or ""), "")


@dataclass(frozen=True)
class Outcome:
    """Numbers of images by what became of them.

    Attributes:
        anomalous, missed, anomalous_review: with a defect; passed as good; left to a person.
        normal, false_alarms, normal_review: without one; failed; left to a person.
        missed_kinds: missed images by defect type.
        decided: whether there are decisions at all.
    """

    anomalous: int
    missed: int
    anomalous_review: int
    normal: int
    false_alarms: int
    normal_review: int
    missed_kinds: Mapping[str, int]
    decided: bool

    @property
    def wrong_share(self) -> float:
        """Share of images judged wrongly; 0 where nothing is decided."""
        return (self.missed + self.false_alarms) / max(1, self.anomalous + self.normal)

    @property
    def in_words(self) -> str:
        """One sentence of what the threshold does."""
        if not self.decided:
            return "No threshold, so nothing is decided: the figures tell how well scores separate."
        parts = []
        if self.anomalous:
            found = self.anomalous - self.missed - self.anomalous_review
            parts.append(f"finds {found:,} of {counted(self.anomalous, 'anomalous image')}")
        if self.normal:
            parts.append(
                f"flags {self.false_alarms:,} of {counted(self.normal, 'normal one' if parts else 'normal image')}"
            )
        review = self.anomalous_review + self.normal_review
        if review:
            parts.append(f"leaves {review:,} to a person's review")
        return f"It {joined(parts)}." if parts else "No image has both a label and a decision."

    @property
    def missed_words(self) -> str:
        """Say what was missed, by defect type; "" where nothing was, or only one type is known."""
        kinds = sorted(self.missed_kinds.items(), key=lambda pair: (-pair[1], pair[0]))
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds if kind)


def outcome(label: np.ndarray, decision: Sequence[str | None], defect: Sequence[str | None]) -> Outcome:
    """Count what became of images; each argument (n,)."""
    verdicts = [verdict(of, decided) for of, decided in zip(label.tolist(), decision, strict=True)]
    counts = Counter(zip(label.tolist(), verdicts, strict=True))
    return Outcome(
        anomalous=int((label == ANOMALOUS).sum()),
        missed=counts[ANOMALOUS, "missed"],
        anomalous_review=counts[ANOMALOUS, "review"],
        normal=int((label == NORMAL).sum()),
        false_alarms=counts[NORMAL, "false alarm"],
        normal_review=counts[NORMAL, "review"],
        missed_kinds=Counter(kind or "" for kind, what in zip(defect, verdicts, strict=True) if what == "missed"),
        decided=any(one is not None for one in decision),
    )


def counted(count: int, noun: str) -> str:
    """Return a number and a noun in singular or plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def joined(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
