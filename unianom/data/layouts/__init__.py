"""Published and common layouts of data sets: each walks a source and yields its samples without opening an image.

The order of the samples, and every split a layout draws itself, depend on names and seeds only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from unianom.data.layouts import (
    aptos,
    btad,
    cifar,
    class_folders,
    folder,
    isic2018,
    kolektor,
    manifest,
    merged,
    mtd,
    mvtec,
    mvtec3d,
    oct2017,
    ped2,
    polyps,
    vad,
    visa,
)
from unianom.data.layouts.base import Layout, LayoutOptions, LeftOut, Source, make_options, nearest
from unianom.data.layouts.class_lists import IMAGENET_30, SPECIES_60, SPECIES_60_SPLITS
from unianom.data.schema import SampleRef
from unianom.errors import DataError, OptionError

__all__ = [
    "IMAGENET_30",
    "LAYOUTS",
    "SPECIES_60",
    "SPECIES_60_SPLITS",
    "Layout",
    "LayoutOptions",
    "LeftOut",
    "Source",
    "iter_samples",
    "make_options",
]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("mvtec", mvtec.MvtecOptions, mvtec.samples, "MVTec AD, one category of it, or its merged form"),
        Layout("mvtec3d", mvtec3d.Mvtec3dOptions, mvtec3d.samples, "MVTec 3D-AD: its colour images, centre-cropped"),
        Layout("visa", visa.VisaOptions, visa.samples, "VisA, raw with its split file or prepared"),
        Layout("btad", btad.BtadOptions, btad.samples, "BTAD, the beanTech products 01, 02 and 03"),
        Layout("mtd", mtd.MtdOptions, mtd.samples, "MTD, magnetic tiles: seeded split of the images without defect"),
        Layout("kolektor", kolektor.KolektorOptions, kolektor.samples, "KolektorSDD: seeded split by commutator"),
        Layout("vad", vad.VadOptions, vad.samples, "VAD: labelled images, defects in the training split too"),
        Layout("aptos", aptos.AptosOptions, aptos.samples, "APTOS 2019: graded retinas, published draw, cropped"),
        Layout("oct2017", oct2017.Oct2017Options, oct2017.samples, "OCT2017: retinal tomography in four classes"),
        Layout("isic2018", isic2018.Isic2018Options, isic2018.samples, "ISIC 2018 task 3: skin lesions, naevi normal"),
        Layout("polyps", polyps.PolypOptions, polyps.samples, "Kvasir, CVC-ClinicDB, CVC-ColonDB: polyps with masks"),
        Layout("ped2", ped2.Ped2Options, ped2.samples, "UCSD Ped2: frames of surveillance video with labels or masks"),
        Layout(
            "class_folders",
            class_folders.ClassOptions,
            class_folders.samples,
            "train and test folders of classes, some of them normal (ImageNet-30, Species-60)",
        ),
        Layout("cifar", cifar.CifarOptions, cifar.samples, "CIFAR-10 or CIFAR-100, binary or in class folders"),
        Layout("folder", folder.FolderOptions, folder.samples, "folders named by you, or any images without labels"),
        Layout("manifest", manifest.ManifestOptions, manifest.samples, "JSON lines naming every image (UniAD family)"),
        Layout("merged", merged.MergedOptions, merged.samples, "several sources as one, named by a YAML file"),
    )
}
"""Every layout by name."""


def iter_samples(
    layout: str,
    source: str | os.PathLike[str],
    options: LayoutOptions | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[SampleRef]:
    """Samples of a source, lazily and always in the same order.

    Args:
        layout: name in `LAYOUTS`.
        source: root folder as local path or URI; for `merged` the YAML file.
        options: an instance of the layout's options class; None takes the defaults.
        left_out: is told, while iterating, what lies in the places of images and is not taken.

    Raises:
        OptionError: no such layout, or options of another one. Also while iterating: an option that does not fit what
            is found.
        DataError: unknown URI scheme. Also while iterating: the source is missing, incomplete, empty or laid out
            differently.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"no layout '{layout}'{nearest(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    options = chosen.options() if options is None else options
    if type(options) is not chosen.options:
        raise OptionError(f"layout {layout} takes {chosen.options.__name__}, not {type(options).__name__}")
    return _never_empty(chosen, Source.open(source, options.dataset, left_out), options)


def _never_empty(layout: Layout, source: Source, options: LayoutOptions) -> Iterator[SampleRef]:
    empty = True
    for sample in layout.samples(source, options):
        empty = False
        yield sample
    if empty:
        raise DataError(f"no samples in {source.uri()} as layout {layout.name}; found: {source.found()}")
