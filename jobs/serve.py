"""Serve a model over HTTP: images in, scores, decisions, heat maps out.

python jobs/serve.py --model runs/uniformaly
python jobs/serve.py --model models:/line-3@champion --shadow models:/line-3@challenger --host 0.0.0.0
"""

from pipelines.runtime.cli import run
from pipelines.serving.serve_options import ServeOptions


def main(options: ServeOptions) -> None:
    """Serve until stopped."""
    from pipelines.serving.serve import serve

    serve(options)


if __name__ == "__main__":
    run(main, ServeOptions)
