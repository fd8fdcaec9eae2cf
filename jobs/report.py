"""Write one HTML file that shows whether it works on your images.

Of several evaluations it shows all models beside each other, of scores without labels the most anomalous first.

python jobs/report.py --evaluation evaluations/mvtec --output report.html
"""

from pipelines.reporting.options import ReportOptions
from pipelines.runtime.cli import console, run


def main(options: ReportOptions) -> None:
    """Write the report and print where it is."""
    options.check_given()
    from pipelines.reporting.html import write_report

    console.print(f"report written: {write_report(options)}")


if __name__ == "__main__":
    run(main, ReportOptions)
