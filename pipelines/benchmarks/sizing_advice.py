"""What a sizing means, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.benchmarks.sizing_figures import (
    COMPUTING,
    DISK,
    FEEDING,
    GPU,
    PARTS,
    Capacity,
    Node,
    counted,
)

LARGE = 2
"""Times the size of the network's input from which on a JPEG file can be decoded at a part of its size."""

DEAR_MAPS = 0.9
"""Share of the rate without maps below which keeping them is worth a word."""

POOR_SCALING = 0.8
"""Share of the perfect rate below which a machine's cores hold each other up."""

BUSY_LOAD = 0.2
"""Load average ÷ cores from which on other work disturbs what is measured."""


@dataclass(frozen=True)
class Findings:
    """What advice is made of.

    Attributes:
        node: that was asked about.
        capacities: of it, by GPU rate and maps kept.
        milliseconds: of an image by part of the work, by maps kept.
        listed: whether images are fetched from where they lie, not read from shards.
        jpeg: whether most images are JPEG files.
        short_side: median of the images' shorter sides ÷ that to which they are scaled.
        scaled: whether the model decodes JPEG files at a part of their size.
        other_engine: whether OpenVINO could be tried instead.
        scaling: rate of all workers ÷ (workers · rate of one), by their number.
        load: load average before anything was measured.
        cores: of this machine.
    """

    node: Node
    capacities: Sequence[Capacity]
    milliseconds: Mapping[str, Mapping[str, float]]
    listed: bool
    jpeg: bool
    short_side: float
    scaled: bool
    other_engine: bool
    scaling: Mapping[int, float]
    load: float
    cores: int


def advice(found: Findings) -> list[str]:
    """Return what to know and to do, most important first."""
    sentences = []
    for one in found.capacities:
        if one.maps == "none":
            sentences += _of_node(found, one)
    return [*sentences, *_of_maps(found), *_of_machine(found)]


def _of_node(found: Findings, one: Capacity) -> list[str]:
    """Say what bounds a node without maps, and what helps."""
    node = found.node
    if one.gpu_rate is None:
        told = f"{counted(node.cores, 'core')} without a GPU score {_rate(one.rate)} images/s"
        if one.bound == DISK:
            return [f"{told}: the disk is the bottleneck. {_disk_help(one)}"]
        part, share = _largest(found.milliseconds["none"], PARTS)
        return [f"{told}; {part} takes {share:.0%} of their time. {_help(found, part, has_gpu=False)}"]
    assert one.cores_needed is not None
    if node.gpus == 1:
        gpus, drive = f"one GPU at {_rate(one.gpu_rate)} images/s needs", "1 to drive it"
    else:
        gpus = f"{node.gpus} GPUs at {_rate(one.gpu_rate)} images/s each need"
        drive = f"{node.gpus} to drive them"
    feeding = one.cores_needed - node.gpus
    needs = f"{gpus} {counted(one.cores_needed, 'core')}: {feeding} for reading, decoding and writing, {drive}"
    has = f"this node has {node.cores}"
    if one.bound == GPU:
        return [f"{_capital(needs)}; {has}. The GPU is the bottleneck, as it should be."]
    if one.bound == DISK:
        return [
            f"{_capital(needs)}; {has}. The disk is the bottleneck: the GPU is busy {one.gpu_share:.0%} of the time. "
            f"{_disk_help(one)}"
        ]
    part, share = _largest(found.milliseconds["none"], FEEDING)
    return [
        f"{_capital(needs)}; {has}, so the GPU is busy {one.gpu_share:.0%} of the time. {_capital(part)} takes "
        f"{share:.0%} of what CPUs do. {_help(found, part, has_gpu=True)}"
    ]


WORDS = {
    "read": "reading",
    "decode": "decoding",
    "resize": "resizing",
    "copy": "copying and normalising",
    "forward": "the network",
    "search": "searching the memory bank",
    "map": "making maps",
    "other": "what is around the network",
    "encode maps": "encoding maps",
    "write": "writing",
}
"""Parts of the work as sentences name them."""


def _largest(milliseconds: Mapping[str, float], parts: Sequence[str]) -> tuple[str, float]:
    """Return the part that takes most, in words, and its share of all these parts."""
    part = max(parts, key=lambda one: milliseconds.get(one, 0.0))
    return WORDS[part], milliseconds[part] / sum(milliseconds.get(one, 0.0) for one in parts)


def _help(found: Findings, part: str, has_gpu: bool) -> str:
    """Say what helps against the part that takes most."""
    more = (
        "Add CPUs: those of any machine of the cluster feed the GPUs."
        if has_gpu
        else "Add machines: the rate grows with the cores."
    )
    if part == WORDS["decode"] and found.jpeg and not found.scaled and found.short_side >= LARGE:
        return (
            f"Images are {found.short_side:.1f} times as large as the network needs: fit the model with "
            f"--method.input.decode scaled, or store them smaller with jobs/ingest.py --resize. {more}"
        )
    if part in (WORDS["decode"], WORDS["resize"]) and found.short_side >= LARGE:
        return (
            f"Images are {found.short_side:.1f} times as large as the network needs: store them smaller with "
            f"jobs/ingest.py --resize. {more}"
        )
    if part == WORDS["read"] and found.listed:
        return f"Put the images into shards with jobs/ingest.py, which are read at once. {more}"
    if part == WORDS["forward"] and found.other_engine:
        return f"Try --runtime.engine openvino, whose speed jobs/benchmark.py encoder tells. {more}"
    if part in [WORDS[one] for one in COMPUTING] and not has_gpu:
        return f"A GPU takes that over. {more}"
    return more


def _disk_help(one: Capacity) -> str:
    return (
        f"It allows {_rate(one.limits[DISK])} images/s: put images and scores on different or faster disks, or store "
        f"smaller images with jobs/ingest.py --resize."
    )


def _of_maps(found: Findings) -> list[str]:
    """Say what maps cost, where it is much: at the GPU rate at which it is most."""
    groups: list[dict[str, Capacity]] = []
    for one in found.capacities:
        if one.maps == "none":  # with which each GPU begins; one that is here has a rate for each kind of maps
            groups.append({})
        groups[-1][one.maps] = one
    told = []
    for kinds in groups:
        rates = {maps: one.rate for maps, one in kinds.items()}
        if "all" in rates and rates["all"] < DEAR_MAPS * rates["none"]:
            lost, flagged = (max(0.0, 1 - rates[kind] / rates["none"]) for kind in ("all", "flagged"))
            gpu_rate = kinds["none"].gpu_rate
            device = "" if gpu_rate is None else f" beside a GPU at {_rate(gpu_rate)} images/s"
            told.append(
                (
                    lost,
                    f"Keeping the maps of all images lowers the rate{device} by {lost:.0%}, of flagged ones by "
                    f"{flagged:.0%}: take --maps flagged, or none, unless each map is needed.",
                )
            )
    return [sentence for _, sentence in sorted(told)[-1:]]


def _of_machine(found: Findings) -> list[str]:
    """Say where the machine makes figures worse than they need be."""
    sentences = []
    busy = found.load > BUSY_LOAD * found.cores
    if found.scaling:
        most = max(found.scaling)
        if most > 1 and found.scaling[most] < POOR_SCALING:
            sentences.append(
                f"{most} workers do {found.scaling[most]:.0%} of {most} times what one does: "
                + (
                    "other work ran beside them."
                    if busy
                    else "cores share memory, caches and, with hyper-threading, each other; count on that rate."
                )
            )
    if busy:
        sentences.append(
            f"The machine was busy before anything was measured (load {found.load:.1f} on "
            f"{counted(found.cores, 'core')}): measure again when it is idle; CPU times suffer less than rates."
        )
    return sentences


def _rate(value: float) -> str:
    """Return images per second in as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
