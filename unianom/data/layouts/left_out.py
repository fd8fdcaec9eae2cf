"""What a listing saw in the places of images and did not take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class CountedFiles:
    """Files of one folder by the endings of their names, in small letters: how many, and the first.

    Attributes:
        endings: of those that were added.
    """

    def __init__(self) -> None:
        self.endings: dict[str, tuple[int, str]] = {}

    def add(self, ending: str, where: str) -> None:
        """Add a file by its path or URI."""
        count, first = self.endings.get(ending, (0, where))
        self.endings[ending] = (count + 1, first)


@dataclass
class LeftOut:
    """What a listing saw in the places of images and did not take.

    Attributes:
        files: by the path or URI of their folder, how many of each ending, in small letters, and one of them.
        folders: path or URI of each folder that no image is taken from, and how many images lie in and below it, as far
            as `Source` lists them.
        links: those to a folder that the link itself lies in, which are not followed.
    """

    files: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)

    def set_files(self, folder: str, files: CountedFiles) -> None:
        """Say which files of a folder are not taken; a folder that is listed again says so once."""
        if files.endings:
            self.files[folder] = files.endings

    def summary(self) -> dict[str, Any]:
        """Return counts and examples as a manifest holds them: files by ending, folders with an image, links; what
        there is none of has no key."""
        endings: dict[str, dict[str, Any]] = {}
        for folder in sorted(self.files):
            for ending, (count, example) in self.files[folder].items():
                found = endings.setdefault(ending, {"count": 0, "example": example})
                found["count"] += count
        folders = {folder: images for folder, images in sorted(self.folders.items()) if images}
        summary: dict[str, Any] = {}
        if endings:
            summary["files"] = dict(sorted(endings.items()))
        if folders:
            images = sum(folders.values())
            summary["folders"] = {"count": len(folders), "images": images, "examples": list(folders)[:10]}
        if self.links:
            summary["links"] = {"count": len(self.links), "examples": sorted(self.links)[:10]}
        return summary
