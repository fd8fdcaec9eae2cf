"""Images on any store → shards.

    source ─ layout ─▶ plan: samples dealt out to parts ─ actors: read, check, pack ─▶ parts ─▶ manifest

Encoded bytes are stored untouched, unless the layout crops: then the crop is stored, as PNG. A file that cannot be
used becomes a rejected row with its reason. The listing lies in a temporary database, so memory does not grow with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pipelines.data.ingest_manifest import check_rejected, commit
from pipelines.data.ingest_part import PartIngester
from pipelines.data.ingest_plan import PartTasks, SampleListing, part_name
from pipelines.data.options import IngestOptions
from pipelines.runtime import outputs
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from unianom import files
from unianom.data.layouts import LAYOUTS, LeftOut, iter_samples, make_options
from unianom.data.shards import ShardSet
from unianom.errors import OptionError
from unianom.options import to_plain
from unianom.temporary_database import temporary_database


@dataclass(frozen=True)
class IngestResult:
    """What an ingest did.

    Attributes:
        shards: the finished shard set.
        fresh: whether this run wrote anything.
        images_per_second: of this run; 0 if it had nothing to do.
    """

    shards: ShardSet
    fresh: bool
    images_per_second: float


def ingest(options: IngestOptions) -> IngestResult:
    """Ingest, continue an interrupted ingest, or find it done.

    Raises:
        DataError: the source is not what its layout says, two samples have one name, the output is another's, or too
            much was rejected.
    """
    if options.layout not in LAYOUTS:
        near = get_close_matches(options.layout, LAYOUTS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise OptionError(f"no layout '{options.layout}'{hint} Known: {', '.join(LAYOUTS)}")
    layout_options = make_options(LAYOUTS[options.layout], options.layout_options)
    left_out = LeftOut()
    output = files.full_uri(options.output)
    with temporary_database() as database:
        listing = SampleListing(database, iter_samples(options.layout, options.source, layout_options, left_out))
        listing.check_unique()
        if options.contaminate:
            listing.contaminate(options.contaminate, options.contaminate_seed)
        parts = listing.deal(options.part_bytes, options.min_parts)
        plan = {
            "layout": options.layout,
            "source": files.full_uri(options.source),
            "layout_options": options.layout_options,
            "resize": options.resize,
            "limits": to_plain(options.limits),
            "parts": parts,
            "samples": listing.digest(),
        }
        if options.contaminate:  # only then, so that shard sets from before there was this option stay the same plan
            plan["contaminate"] = [options.contaminate, options.contaminate_seed]
        if options.reading:
            plan["reading"] = options.reading
        inputs = {"source": options.source}
        with outputs.open_output(output, "shard set", plan, inputs=inputs, overwrite=options.overwrite) as digest:
            fresh = not outputs.is_complete(output)
            rate = 0.0
            if fresh:
                rate = _write_parts(listing, parts, output, digest, options)
                told = {key: plan[key] for key in ("layout", "source", "layout_options", "resize", "limits")}
                told["contaminate"] = plan.get("contaminate")  # share and seed
                told |= {key: plan[key] for key in ("reading",) if key in plan}
                commit(output, digest, told, parts, left_out)
    shards = ShardSet.open(output)
    check_rejected(shards, options.max_reject_fraction)
    return IngestResult(shards, fresh, rate)


def _write_parts(listing: SampleListing, parts: int, output: str, digest: str, options: IngestOptions) -> float:
    left = []
    for part in range(parts):
        record = outputs.part_record(output, part_name(part))
        if record is None or record["plan"] != digest:
            left.append(part)
    images = sum(map(listing.part_count, left))
    if images < listing.count:
        print(f"continuing: {listing.count - images} samples are stored already")
    arguments = {"output": output, "plan": digest, "limits": options.limits, "resize": options.resize}
    arguments |= options.reading
    arguments["threads"] = 2 * options.runtime.cpus_per_worker  # one reads while another decodes
    progress = Progress("ingest", images)
    for record in run_tasks(PartIngester, arguments, PartTasks(listing, left), options.runtime, images):
        progress.advance(record["rows"] + len(record["rejected"]))
    return progress.close()
