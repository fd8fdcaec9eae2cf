"""Find the anomalies in a folder of images, and report.

unianom inspect photos/of/parts
"""

from pipelines.inspect.options import InspectOptions
from pipelines.runtime.cli import run


def main(options: InspectOptions) -> None:
    """Run every step as its own job would."""
    from pipelines.inspect.inspect import inspect

    inspect(options)


if __name__ == "__main__":
    run(main, InspectOptions)
