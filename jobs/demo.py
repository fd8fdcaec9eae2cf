"""Run the whole chain on a drawn corpus, offline, on CPUs.

python jobs/demo.py --output demo
"""

from pipelines.demo import DemoOptions, run_demo
from pipelines.runtime.cli import run

if __name__ == "__main__":
    run(run_demo, DemoOptions)
