"""Write a model as an ONNX file that runs without PyTorch and unianom.

python jobs/export.py --model runs/uniformaly --shards shards/mvtec --output exported/uniformaly
"""

from pipelines.runtime.cli import console, run
from pipelines.serving.options import ExportOptions


def main(options: ExportOptions) -> None:
    """Export and print how well the file agrees with the model."""
    from pipelines.serving.export import export

    result = export(options)
    console.print(f"model {'exported' if result.fresh else 'was exported already'}: {result.folder}")
    console.print(result.agreement)


if __name__ == "__main__":
    run(main, ExportOptions)
