"""unianom: unified visual anomaly detection.

import unianom
model = unianom.load("runs/model")
for result in model.predict(["a.png", "b.png"]):
    print(result.score, result.decision, result.anomaly_map.shape)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unianom.model import ImageResult, Model, load

__version__ = "0.1.0"

__all__ = ["ImageResult", "Model", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` and its types at first use, so that jobs that need no network start without PyTorch."""
    if name in __all__:
        from unianom import model

        return getattr(model, name)
    raise AttributeError(f"module 'unianom' has no attribute '{name}'")
