"""Read images on any store into a shard set.

python jobs/ingest.py --layout mvtec --source data/mvtec --output shards/mvtec
"""

from pipelines.data.ingest import IngestOptions, ingest
from pipelines.data.ingest_summary import print_summary
from pipelines.runtime.cli import run


def main(options: IngestOptions) -> None:
    """Ingest and print what is in the shards."""
    print_summary(ingest(options))


if __name__ == "__main__":
    run(main, IngestOptions)
