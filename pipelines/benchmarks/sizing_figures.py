"""What follows from what the stages of a scoring take: cores, what bounds a node, cost and machines.

All of this is derived, by these formulas; c is the CPU time of an image in seconds, times the slowdown:

    slowdown        = CPU time of an image with all workers at work ÷ with one, at least 1
    cores needed    = ⌈GPU rate · GPUs · c of feeding⌉ + GPUs
    CPU limit       = (cores − GPUs) ÷ c of feeding      with GPUs
                    = cores ÷ c of everything            without
    GPU limit       = GPU rate · GPUs
    disk limit      = 1 ÷ (bytes read ÷ reading rate + bytes written ÷ writing rate)
    images/s        = the smallest limit; its resource is what bounds
    cost            = price of an hour · 10⁶ ÷ (3600 · images/s)
    machines        = ⌈images ÷ (3600 · hours · images/s)⌉
    E(2w)           = rate of 2w workers ÷ (2 · rate of w), median of the rounds

"Feeding" is what a GPU leaves to CPUs: `FEEDING`. A GPU takes one core more, whose thread drives it. The start of a
job is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FEEDING = ("read", "decode", "resize", "encode maps", "write")
"""Parts of the work that CPUs do also where there are GPUs."""

COMPUTING = ("copy", "forward", "search", "map", "other")
"""Parts of the work that are done where the network runs; "copy" is to and from the device, with normalising."""

PARTS = (*FEEDING[:3], *COMPUTING, *FEEDING[3:])
"""All parts, in the order in which images pass through."""

GPU, CPUS, DISK = "GPU", "CPU", "disk"
"""Resources that may bound a node."""


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        cores: of its CPUs.
        gpus: how many.
        price_per_hour: in any currency; None if it is not known.
    """

    cores: int
    gpus: int
    price_per_hour: float | None = None

    def named(self) -> str:
        """Return what it has, in words."""
        return f"{counted(self.cores, 'core')}, {counted(self.gpus, 'GPU')}"


@dataclass(frozen=True)
class Capacity:
    """What a node does.

    Attributes:
        maps: which maps are kept.
        gpu_rate: images per second of each of its GPUs; None where CPUs compute.
        cores_needed: so that its GPUs never wait; None where CPUs compute.
        limits: images per second that each resource allows.
        bound: the resource that allows the fewest.
        rate: images per second.
        cost: of a million images; None without a price.
        machines: such nodes for all images in the time given; None if neither is given.
    """

    maps: str
    gpu_rate: float | None
    cores_needed: int | None
    limits: Mapping[str, float]
    bound: str
    rate: float
    cost: float | None
    machines: int | None

    @property
    def gpu_share(self) -> float | None:
        """Share of the time that its GPUs are busy; None where CPUs compute."""
        return self.rate / self.limits[GPU] if GPU in self.limits else None


def capacity(
    node: Node,
    maps: str,
    milliseconds: Mapping[str, float],
    slowdown: float,
    disk_rate: float | None,
    gpu_rate: float | None = None,
    corpus: int | None = None,
    hours: float = 24.0,
) -> Capacity:
    """Return what a node does; formulas are those of this file.

    Args:
        node: of more cores than GPUs.
        maps: which maps are kept.
        milliseconds: CPU time of an image by part of the work, see `PARTS`.
        slowdown: of that with all cores at work.
        disk_rate: images per second that its disk allows; None if that is not known, which then counts for nothing.
        gpu_rate: images per second that one GPU computes; None has CPUs compute.
        corpus, hours: images to score, and the time for them.
    """
    if gpu_rate is None:
        needed = None
        limits = {CPUS: node.cores / seconds_of(milliseconds, PARTS, slowdown)}
    else:
        feeding = seconds_of(milliseconds, FEEDING, slowdown)
        needed = cores_needed(gpu_rate * node.gpus, feeding) + node.gpus
        limits = {GPU: gpu_rate * node.gpus, CPUS: (node.cores - node.gpus) / feeding}
    if disk_rate is not None:
        limits[DISK] = disk_rate
    bound = min(limits, key=limits.__getitem__)
    rate = limits[bound]
    cost = None if node.price_per_hour is None else cost_per_million(node.price_per_hour, rate)
    machines = None if corpus is None else machines_needed(corpus, hours, rate)
    return Capacity(maps, gpu_rate, needed, limits, bound, rate, cost, machines)


def seconds_of(milliseconds: Mapping[str, float], parts: tuple[str, ...], slowdown: float = 1.0) -> float:
    """Return the CPU seconds that some parts of the work take for an image."""
    return sum(milliseconds.get(part, 0.0) for part in parts) * slowdown / 1000


def cores_needed(rate: float, seconds: float) -> int:
    """Return how many cores do so many images per second, each of which takes one core so many seconds."""
    return _whole(rate * seconds)


def disk_limit(read_bytes: float, read_rate: float, written_bytes: float, write_rate: float) -> float:
    """Return the images per second that a disk allows, each of which it reads and writes.

    Args:
        read_bytes, written_bytes: of an image.
        read_rate, write_rate: bytes per second.
    """
    return 1 / (read_bytes / read_rate + written_bytes / write_rate)


def cost_per_million(price_per_hour: float, rate: float) -> float:
    """Return what a million images cost at so many images per second."""
    return price_per_hour * 1e6 / (3600 * rate)


def machines_needed(images: int, hours: float, rate: float) -> int:
    """Return how many machines of so many images per second score all in the time given."""
    return _whole(images / (3600 * hours * rate))


def worker_counts(most: int) -> list[int]:
    """Return 1, 2, 4 … up to so many workers, and that number itself."""
    counts = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return counts if counts[-1] == most else [*counts, most]


def counted(number: int, name: str) -> str:
    """Return a number with what is counted, in the plural where it is not one."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _whole(number: float) -> int:
    """Round up to a whole number, of at least 1; what floating point adds is no core and no machine."""
    return max(1, math.ceil(round(number, 9)))
