"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the binary distribution, or images in class folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from unianom.data.image import encode_png
from unianom.data.layouts.base import Layout, Recognised
from unianom.data.layouts.class_folders import ClassOptions, choose_task, class_samples
from unianom.data.layouts.class_lists import CIFAR_10, CIFAR_100
from unianom.data.layouts.names import listed
from unianom.data.layouts.source import Source
from unianom.data.schema import SampleRef
from unianom.errors import DataError

_CIFAR_10_FILES = {**{f"data_batch_{n}.bin": "train" for n in range(1, 6)}, "test_batch.bin": "test"}
_CIFAR_100_FILES = {"train.bin": "train", "test.bin": "test"}
_PIXELS = 3 * 32 * 32
_FINE = tuple(sorted(name for names in CIFAR_100.values() for name in names))
_COARSE_OF = {name: coarse for coarse, names in CIFAR_100.items() for name in names}


@dataclass(frozen=True)
class CifarOptions(ClassOptions):
    """Options of the `cifar` layout.

    Args:
        dataset: name of the data set and of its one category; empty takes "cifar10" or "cifar100".
        normal_classes: the normal classes, by name or by index in alphabetical order.
        all_classes: keep every class of both splits without labels, for a later job to choose.
        labels: of CIFAR-100 the 20 superclasses ("coarse", the usual task) or the 100 classes ("fine").
    """

    labels: Literal["coarse", "fine"] = "coarse"


def samples(source: Source, options: CifarOptions) -> Iterator[SampleRef]:
    """Yield samples of CIFAR-10 or CIFAR-100, whichever lies in the root or in its folder of the published name.

    Images of the binary files are encoded as PNG and named <file>#<index>. The Python distribution is pickled and
    therefore never opened.
    """
    for folder, files, name in (
        ("cifar-10-batches-bin", _CIFAR_10_FILES, "cifar10"),
        ("cifar-100-binary", _CIFAR_100_FILES, "cifar100"),
    ):
        place = source.at(folder) if source.has_folder(folder) else source
        there = {entry.name for entry in place.entries()}
        missing = [file for file in files if file not in there]
        if len(missing) == len(files):
            continue
        if missing:
            raise DataError(
                f"{place.uri()} lacks {', '.join(missing)} of the binary {name} distribution; fetch it again"
            )
        yield from _binary_samples(replace(place, dataset=options.dataset or name), options, files)
        return
    if source.has_folder("train") and source.has_folder("test"):
        yield from _folder_samples(source, options)
        return
    pickled = ("cifar-10-batches-py", "cifar-100-python")
    if any(source.has_folder(name) for name in pickled) or source.name in pickled or source.has_file("batches.meta"):
        raise DataError(
            f"{source.uri()} holds the Python distribution of CIFAR, whose pickles can run code and are not opened; "
            f"fetch the binary version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz) instead"
        )
    raise DataError(
        f"no CIFAR in {source.uri()}; found: {source.found()}; expected the cifar layout: data_batch_1.bin … "
        f"data_batch_5.bin and test_batch.bin (CIFAR-10), train.bin and test.bin (CIFAR-100), or train/<class>/*.png "
        f"and test/<class>/*.png"
    )


def _folder_samples(source: Source, options: CifarOptions) -> Iterator[SampleRef]:
    folders = {*source.folders("train"), *source.folders("test")}
    if folders <= set(CIFAR_10):
        yield from class_samples(replace(source, dataset=options.dataset or "cifar10"), options, {})
    elif folders <= set(_FINE):
        coarse = _COARSE_OF if options.labels == "coarse" else {}
        yield from class_samples(replace(source, dataset=options.dataset or "cifar100"), options, coarse)
    else:
        raise DataError(
            f"the class folders of {source.uri()} are neither those of CIFAR-10 nor those of CIFAR-100: "
            f"{listed(sorted(folders))}; read other sets with the class_folders layout"
        )


def _binary_samples(source: Source, options: CifarOptions, files: dict[str, str]) -> Iterator[SampleRef]:
    """Yield records of one label byte (CIFAR-10), or a coarse and a fine one (CIFAR-100), and 3×32×32 pixels."""
    if files is _CIFAR_10_FILES:
        label_bytes, label_at = 1, 0
        classes: tuple[str, ...] = CIFAR_10
    elif options.labels == "coarse":
        label_bytes, label_at = 2, 0
        classes = tuple(CIFAR_100)
    else:
        label_bytes, label_at = 2, 1
        classes = _FINE
    record_bytes = label_bytes + _PIXELS
    task = choose_task(classes, options, source.uri())
    for file, split in files.items():
        with source.fs.open(source.root + "/" + file, "rb") as handle:
            index = 0
            while record := handle.read(record_bytes):
                if len(record) < record_bytes or record[label_at] >= len(classes):
                    raise DataError(f"record {index} of {source.uri(file)} is no CIFAR image; fetch the file again")
                name = classes[record[label_at]]
                if task.keeps(split, name):
                    pixels = np.frombuffer(record, np.uint8, _PIXELS, label_bytes).reshape(3, 32, 32)
                    data = encode_png(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # H W 3
                    yield SampleRef(
                        sample_id=source.sample_id(f"{file}#{index}"),
                        dataset=source.dataset,
                        category=source.dataset,
                        split=split,
                        label=task.label(name),
                        defect=name,
                        uri=f"{source.uri(file)}#{index}",
                        size=len(data),
                        data=data,
                    )
                index += 1
        if index == 0:
            raise DataError(f"{source.uri(file)} is empty; fetch the file again")


def recognise(source: Source) -> Recognised | None:
    """Take the files of the binary distribution, or of the Python one, for this layout."""
    names = {entry.name for entry in source.entries()}
    known = {"cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python"}
    whole = any(names.issuperset(files) for files in (_CIFAR_10_FILES, _CIFAR_100_FILES))
    if not (names & known or source.name in known or whole):
        return None
    return Recognised({}, ("files of CIFAR: every image with its class",), {"normal_classes": [0]})


LAYOUT = Layout("cifar", CifarOptions, samples, "CIFAR-10 or CIFAR-100, binary or in class folders", recognise)
