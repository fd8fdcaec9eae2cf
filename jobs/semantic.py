"""Semantic anomaly detection: one bank for every choice of normal classes, on images that are embedded once.

python jobs/ingest.py --layout class_folders --layout_options.all_classes true --source S --output shards/species60
python jobs/semantic.py uniformaly --shards shards/species60 --output results/species60
"""

from pipelines.evaluation.options import SemanticOptions, protocol_options
from pipelines.runtime.cli import run


def main(options: object) -> None:
    """Run the tasks and print their table."""
    from pipelines.evaluation.semantic import print_semantic, semantic

    print_semantic(semantic(options))


if __name__ == "__main__":
    run(main, protocol_options(SemanticOptions))
