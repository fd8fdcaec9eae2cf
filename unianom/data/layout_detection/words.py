"""What usual names of folders, columns and values say: split, normal or defective, masks."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Role = Literal["normal", "abnormal", "mask", "unlabelled", "other"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SPLIT_WORDS: dict[Literal["train", "val", "test"], frozenset[str]] = {
    "train": _words("train training trainset traindata trn"),
    "val": _words("val valid validation validate dev"),
    "test": _words("test testing testset testdata tst eval evaluation"),
}
NORMAL_WORDS = _words(
    "good ok okay okey normal normals pass passed passing free clean healthy intact perfect flawless undamaged "
    "unbroken undefected nondefective nonanomalous nominal golden accepted accept io gut fehlerfrei "
    "defectfree defectless nodefect nodefects noanomaly"
)
ABNORMAL_WORDS = _words(
    "bad ng nok ko notok nogood nio defect defects defected defective def anomaly anomalies anomalous anomal abnormal "
    "abnormals fail failed failing failure failures fault faults faulty broken damage damaged damages scratch "
    "scratches scratched crack cracks cracked dent dents dented reject rejected rejects flaw flaws flawed error "
    "errors bent chipped contamination contaminated unhealthy schlecht fehler fehlerhaft defekt kaputt ausschuss"
)
_NOT = _words("no not non un without nicht kein keine ohne")
_FREE = _words("free frei less")
_MASK_WORDS = _words(
    "mask masks label labels annotation annotations gt gts groundtruth groundtruths seg segmentation segmentations "
    "segm masken"
)
NEUTRAL_WORDS = _words(
    "image images img imgs picture pictures pic pics photo photos data dataset datasets set sets split splits rgb raw "
    "original originals input inputs sample samples frame frames file files jpegimages jpg jpeg png bmp tif tiff part "
    "parts bilder bild folder"
)
_UNLABELLED_WORDS = _words("unlabelled unlabeled unknown unsorted unclassified query queries new inbox")
_OTHER_WORDS = _words(
    "backup backups result results output outputs out vis visual visuals visualization visualizations visualisation "
    "visualisations heatmap heatmaps thumb thumbs thumbnail thumbnails preview previews tmp temp doc docs trash "
    "calibration model models run runs cache report reports figures"
)


@dataclass(frozen=True)
class Meaning:
    """What a name says.

    Attributes:
        split: "train", "val" or "test"; None if it names none or several.
        role: what the images are; "other" are no data, None if it says nothing or contradicts itself.
        neutral: whether it says no more than that there are images.
    """

    split: Literal["train", "val", "test"] | None = None
    role: Role | None = None
    neutral: bool = False

    @property
    def is_split(self) -> bool:
        """Whether the name is that of a split and of nothing else."""
        return self.split is not None and self.role is None


def tokens(name: str) -> list[str]:
    """Return the words of a name in small letters: "notOK_front 2" → not, ok, front, 2."""
    text = unicodedata.normalize("NFC", name)
    text = re.sub(r"(?<=[a-zß-ÿ])(?=[A-ZÀ-Þ])", " ", text)
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def meaning(name: str) -> Meaning:
    """Return what the name of a folder says."""
    words = tokens(name)
    splits = {split for split, known in SPLIT_WORDS.items() for word in words if word in known}
    split = splits.pop() if len(splits) == 1 else None
    if any(word in _MASK_WORDS for word in words) or "groundtruth" in "".join(words):
        return Meaning(split, "mask")
    role = condition(name)
    if role is not None:
        return Meaning(split, role)
    known = frozenset().union(*SPLIT_WORDS.values())
    rest = [word for word in words if word not in NEUTRAL_WORDS and word not in known and not word.isdigit()]
    if split is not None:
        return Meaning(split) if not rest and not any(word.isdigit() for word in words) else Meaning()
    if rest and all(word in _UNLABELLED_WORDS for word in rest):
        return Meaning(None, "unlabelled")
    if any(word in _OTHER_WORDS for word in rest):
        return Meaning(None, "other")
    return Meaning(neutral=bool(words) and not rest and not any(word.isdigit() for word in words))


def condition(name: str) -> Literal["normal", "abnormal"] | None:
    """Return whether a name calls something normal or defective; None if it says neither or both."""
    words = tokens(name)
    joined = "".join(words)
    if joined in NORMAL_WORDS:
        return "normal"
    if joined in ABNORMAL_WORDS:
        return "abnormal"
    said: set[Literal["normal", "abnormal"]] = set()
    for number, word in enumerate(words):
        if word not in NORMAL_WORDS and word not in ABNORMAL_WORDS:
            continue
        after, before = words[number + 1 : number + 2], words[number - 1 : number] if number else []
        is_normal = word in NORMAL_WORDS
        if word in _FREE and before and (before[0] in ABNORMAL_WORDS):
            continue  # the end of "defect free"
        if not is_normal and after and after[0] in _FREE:
            is_normal = True
        if before and before[0] in _NOT:
            is_normal = not is_normal
        said.add("normal" if is_normal else "abnormal")
    return said.pop() if len(said) == 1 else None
