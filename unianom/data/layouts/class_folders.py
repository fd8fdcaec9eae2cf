"""Class folders for semantic anomaly detection: some classes are normal, the others anomalous.

ImageNet-30 (Hendrycks et al., NeurIPS 2019) and Species-60 (UniFormaly, arXiv 2307.12540) lie this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from unianom.data.layouts.base import Layout, LayoutOptions, Recognised
from unianom.data.layouts.class_lists import SPECIES_60, SPECIES_60_SPLITS
from unianom.data.layouts.names import listed, nearest
from unianom.data.layouts.source import Source
from unianom.data.schema import ANOMALOUS, NORMAL, SampleRef
from unianom.errors import DataError, OptionError

EXPECTED = (
    "the class_folders layout: one_class_train/<class> and one_class_test/<class>, or train/<class> and test/<class>"
)


@dataclass(frozen=True)
class ClassOptions(LayoutOptions):
    """Options of layouts that hold classes.

    Args:
        dataset: name of the data set and of its one category; empty takes the root's name.
        normal_classes: the normal classes, by name or by index in alphabetical order (a number that is the name of a
            class means that class); for Species-60 also split_A … split_E, the published sets of 30. The training
            split then holds these classes only, the test split all.
        all_classes: keep every class of both splits without labels, for a later job to choose.
    """

    normal_classes: str | tuple[int | str, ...] = ()
    all_classes: bool = False

    def check(self) -> None:
        super().check()
        if self.all_classes and self.normal_classes:
            raise OptionError(
                "normal_classes and all_classes exclude each other; name normal_classes or leave all open"
            )


@dataclass(frozen=True)
class Task:
    """What is normal.

    Attributes:
        normal: normal classes; None leaves every sample without a label.
    """

    normal: frozenset[str] | None

    def keeps(self, split: str, name: str) -> bool:
        """Return whether samples of class `name` belong to the split: training takes normal classes only."""
        return self.normal is None or split != "train" or name in self.normal

    def label(self, name: str) -> int | None:
        """Return the label of class `name`."""
        if self.normal is None:
            return None
        return NORMAL if name in self.normal else ANOMALOUS


def choose_task(classes: Sequence[str], options: ClassOptions, where: str) -> Task:
    """Return which of the `classes`, sorted, the options call normal.

    Raises:
        OptionError: none is named, or one that is not there.
    """
    if options.all_classes:
        return Task(None)
    if not options.normal_classes:
        raise OptionError(
            f"{where} holds {len(classes)} classes ({listed(classes, 100)}): say which are normal with "
            f"normal_classes, by name or index in this order, or keep all without labels with all_classes=true"
        )
    wanted = options.normal_classes
    normal: set[str] = set()
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        if str(name) in classes:  # a class may be named by a number
            normal.add(str(name))
        elif isinstance(name, int):
            if not 0 <= name < len(classes):
                raise OptionError(
                    f"normal_classes: no class number {name} in {where}, which has 0 … {len(classes) - 1}"
                )
            normal.add(classes[name])
        elif name in SPECIES_60_SPLITS:
            if tuple(classes) != SPECIES_60:
                raise OptionError(
                    f"normal_classes: {name} is defined on the 60 classes of Species-60, which {where} is not"
                )
            normal.update(SPECIES_60[index] for index in SPECIES_60_SPLITS[name])
        else:
            raise OptionError(
                f"normal_classes: no class '{name}' in {where}{nearest(name, classes)}; found: {listed(classes)}"
            )
    return Task(frozenset(normal))


def samples(source: Source, options: ClassOptions) -> Iterator[SampleRef]:
    """Yield samples of class folders; `defect` is the class, of normal samples too, and the data set is one
    category."""
    yield from class_samples(source, options, {})


def class_samples(source: Source, options: ClassOptions, class_of: Mapping[str, str]) -> Iterator[SampleRef]:
    """Yield as `samples`; folders that are keys of `class_of` belong to the class given there, others to their own."""
    for parents in ({"train": "one_class_train", "test": "one_class_test"}, {"train": "train", "test": "test"}):
        if all(source.has_folder(parent) for parent in parents.values()):
            break
    else:
        raise DataError(
            f"no training and test folder under {source.uri()}; found: {source.found()}; expected {EXPECTED}"
        )
    folders = {split: source.folders(parent) for split, parent in parents.items()}
    for split, parent in parents.items():
        if not folders[split]:
            raise DataError(
                f"no class folders in {source.uri(parent)}; found: {source.found(parent)}; expected {EXPECTED}"
            )
    classes = sorted({class_of.get(folder, folder) for split in folders for folder in folders[split]})
    task = choose_task(classes, options, source.uri())
    trained = {class_of.get(folder, folder) for folder in folders["train"]}
    if task.normal is not None and not task.normal <= trained:
        raise DataError(
            f"no training images of the normal class {listed(sorted(task.normal - trained))} in "
            f"{source.uri(parents['train'])}"
        )
    for split, parent in parents.items():
        for folder in folders[split]:
            name = class_of.get(folder, folder)
            if task.keeps(split, name):
                for image in source.images_below(f"{parent}/{folder}"):
                    yield source.sample(
                        image, category=source.dataset, split=split, label=task.label(name), defect=name
                    )


def recognise(source: Source) -> Recognised | None:
    """Take one_class_train and one_class_test for this layout; which classes are normal only people know."""
    if not (source.has_folder("one_class_train") and source.has_folder("one_class_test")):
        return None
    decision = "one_class_train → to train on, one_class_test → to test, each folder inside → a class"
    return Recognised({}, (decision,), {"normal_classes": source.folders("one_class_train")[:1]})


LAYOUT = Layout(
    "class_folders",
    ClassOptions,
    samples,
    "train and test folders of classes, some of them normal (ImageNet-30, Species-60)",
    recognise,
)
