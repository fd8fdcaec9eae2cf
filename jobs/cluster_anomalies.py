"""Cluster test images by their anomalous patches, and compare the clusters with the defect types.

python jobs/cluster_anomalies.py --model runs/uniformaly --shards shards/mvtec --output clusters/mvtec
"""

from pipelines.evaluation.clustering import ClusterOptions, cluster_anomalies, print_clustering
from pipelines.runtime.cli import run


def main(options: ClusterOptions) -> None:
    """Cluster and print what came of it."""
    print_clustering(cluster_anomalies(options))


if __name__ == "__main__":
    run(main, ClusterOptions)
