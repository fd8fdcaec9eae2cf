"""Write an evaluation as one HTML file.

python jobs/report.py --evaluation evaluations/mvtec --output report.html
"""

from pipelines.reporting.options import ReportOptions
from pipelines.runtime.cli import console, run


def main(options: ReportOptions) -> None:
    """Write the report and print where it is."""
    from pipelines.reporting.html import write_report

    console.print(f"report written: {write_report(options)}")


if __name__ == "__main__":
    run(main, ReportOptions)
