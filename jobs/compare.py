"""Compare evaluations of many models and data sets.

python jobs/compare.py --evaluations evaluations/uniad,evaluations/onenip --output comparisons/mvtec
"""

from pipelines.commandline import console, run
from pipelines.comparison import CompareOptions, compare, print_comparison


def main(options: CompareOptions) -> None:
    """Compare and print the tables."""
    print_comparison(compare(options))
    console.print(f"comparison written: {options.output} (comparison.csv, .md, .tex and .json)")


if __name__ == "__main__":
    run(main, CompareOptions)
