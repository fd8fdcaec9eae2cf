"""unianom: unified visual anomaly detection.

import unianom
model = unianom.load("runs/model")
for result in model.predict(["a.png", "b.png"]):
    print(result.score, result.decision, result.anomaly_map.shape)
"""

from unianom.model import ImageResult, Model, load

__version__ = "0.1.0"

__all__ = ["ImageResult", "Model", "load"]
