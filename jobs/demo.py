"""Run the whole chain on a drawn corpus, offline, on CPUs.

python jobs/demo.py --output demo
"""

from pipelines.runtime.cli import run
from pipelines.runtime.options import DemoOptions


def main(options: DemoOptions) -> None:
    """Run every step as its job would."""
    from pipelines.demo import run_demo

    run_demo(options)


if __name__ == "__main__":
    run(main, DemoOptions)
