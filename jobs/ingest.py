"""Read images on any store into a shard set.

python jobs/ingest.py --layout mvtec --source data/mvtec --output shards/mvtec
"""

from pipelines.commandline import console, print_table, run
from pipelines.ingest import IngestOptions, IngestResult, ingest


def main(options: IngestOptions) -> None:
    """Ingest and print what is in the shards."""
    print_summary(ingest(options))


def print_summary(result: IngestResult) -> None:
    """Counts by category and split, and what to know before trusting a figure."""
    manifest = result.shards.manifest
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for entry in manifest["counts"]:
        label = {0: "normal", 1: "anomalous", None: "unlabelled"}[entry["label"]]
        cell = rows.setdefault((entry["dataset"], entry["category"]), {})
        cell[f"{entry['split']} {label}"] = cell.get(f"{entry['split']} {label}", 0) + entry["count"]
    columns = sorted({column for cell in rows.values() for column in cell}, key=_column_order)
    table = [[f"{d}/{c}", *(str(cell.get(column, "–")) for column in columns)] for (d, c), cell in rows.items()]
    print_table("samples", ["data set / category", *columns], table)
    summary = manifest["summary"]
    console.print(
        f"sizes: height {summary['height'][0]}–{summary['height'][1]}, width {summary['width'][0]}–"
        f"{summary['width'][1]}, {summary['distinct_sizes']} distinct"
    )
    for key, text in (
        ("duplicates", "groups of identical files"),
        ("duplicates_across_splits", "groups of identical files on both sides of the split"),
        ("duplicates_with_other_label", "groups of identical files with different labels"),
    ):
        if summary[key]["groups"]:
            console.print(
                f"warning: {summary[key]['groups']} {text}, e.g. {', '.join(summary[key]['examples'][0][:2])}"
            )
    for problem, found in summary["masks"].items():
        if found["count"]:
            text = problem.replace("_", " ")
            console.print(f"note: masks {text}: {found['count']} anomalous images, e.g. {found['examples'][0]}")
    for status, count in manifest["rejected"].items():
        console.print(f"rejected: {count} {status}; see {result.shards.uri}/_rejected.parquet")
    done = "written" if result.fresh else "was complete already"
    console.print(
        f"shard set {done}: {result.shards.uri} ({len(result.shards.parts)} parts, {manifest['bytes']:,} bytes)"
    )


def _column_order(column: str) -> tuple[int, str]:
    return ("train", "val", "test").index(column.split()[0]), column


if __name__ == "__main__":
    run(main, IngestOptions)
