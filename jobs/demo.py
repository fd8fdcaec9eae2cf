"""Run the whole chain on a drawn corpus, offline, on CPUs.

python jobs/demo.py --output demo
"""

from pipelines.commandline import run
from pipelines.demo import DemoOptions, run_demo

if __name__ == "__main__":
    run(run_demo, DemoOptions)
