"""Cluster test images by their anomalous patches.

python jobs/cluster_anomalies.py --model runs/uniformaly --shards shards/mvtec --output clusters/mvtec
"""

from pipelines.evaluation.options import ClusterOptions
from pipelines.runtime.cli import run


def main(options: ClusterOptions) -> None:
    """Cluster and print what came of it."""
    from pipelines.evaluation.cluster_anomalies import cluster_anomalies
    from pipelines.reporting.cluster_report import print_clustering

    result = cluster_anomalies(options)
    print_clustering(result.content, result.folder, result.fresh)


if __name__ == "__main__":
    run(main, ClusterOptions)
