"""Fit a bank to every choice of normal classes (semantic).

python jobs/ingest.py --layout class_folders --layout_options.all_classes true --source S --output shards/species60
python jobs/semantic.py uniformaly --shards shards/species60 --output results/species60
"""

from pipelines.evaluation.options import SemanticOptions, protocol_options
from pipelines.runtime.cli import run


def main(options: SemanticOptions) -> None:
    """Run the tasks and print their table."""
    from pipelines.evaluation.semantic import semantic
    from pipelines.reporting.semantic_report import print_semantic

    result = semantic(options)
    print_semantic(result.content, result.folder, result.fresh)


if __name__ == "__main__":
    run(main, protocol_options(SemanticOptions))
