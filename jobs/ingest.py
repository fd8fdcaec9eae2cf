"""Read images on any store into a shard set.

python jobs/ingest.py --layout mvtec --source data/mvtec --output shards/mvtec
"""

from pipelines.data.options import IngestOptions
from pipelines.runtime.cli import run


def main(options: IngestOptions) -> None:
    """Ingest and print what is in the shards."""
    from pipelines.data.ingest import ingest
    from pipelines.data.ingest_summary import print_summary

    print_summary(ingest(options))


if __name__ == "__main__":
    run(main, IngestOptions)
