"""Write an evaluation as one HTML file.

python jobs/report.py --evaluation evaluations/mvtec --output report.html
"""

from pipelines.reporting.html import ReportOptions, write_report
from pipelines.runtime.cli import console, run


def main(options: ReportOptions) -> None:
    """Write the report and print where it is."""
    console.print(f"report written: {write_report(options)}")


if __name__ == "__main__":
    run(main, ReportOptions)
