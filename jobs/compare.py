"""Compare evaluations of many models and data sets.

python jobs/compare.py --evaluations evaluations/uniad,evaluations/onenip --output comparisons/mvtec
"""

from pipelines.evaluation.options import CompareOptions
from pipelines.runtime.cli import console, run


def main(options: CompareOptions) -> None:
    """Compare and print the tables."""
    from pipelines.evaluation.compare import compare
    from pipelines.reporting.comparison_report import print_comparison

    print_comparison(compare(options))
    console.print(f"comparison written: {options.output} (comparison.csv, .md, .tex and .json)")


if __name__ == "__main__":
    run(main, CompareOptions)
