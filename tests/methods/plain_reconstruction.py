"""A second implementation of the reconstruction transformers, in float64 and with loops, for one image at a time.

It reads the weights of a method's state dict by name and shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Plain:
    """The forward pass of a reconstruction transformer.

    Args:
        state: the method's weights.
        heads: attention heads.
        grid: rows and columns of tokens.
        window: side of the hidden neighbourhood; 0 for none.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], heads: int, grid: tuple[int, int], window: int) -> None:
        self.state = {key: value.double().numpy() for key, value in state.items()}
        self.heads, self.grid, self.window = heads, grid, window
        rows, columns = (self.state[f"transformer.position.{axis}"] for axis in ("rows", "columns"))
        self.position = [np.concatenate([columns[c], rows[r]]) for r in range(grid[0]) for c in range(grid[1])]

    def layers(self, prefix: str) -> int:
        """How many numbered modules there are below a name."""
        return len({key[len(prefix) + 1 :].split(".")[0] for key in self.state if key.startswith(f"{prefix}.")})

    def sees(self, query: int, key: int, masked: bool) -> bool:
        if not masked or not self.window:
            return True
        rows, columns = abs(query // self.grid[1] - key // self.grid[1]), abs(query % self.grid[1] - key % self.grid[1])
        return max(rows, columns) > self.window // 2

    def linear(self, x: Array, name: str) -> Array:
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]

    def norm(self, x: Array, name: str) -> Array:
        scaled = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attend(self, queries: list[Array], keys: list[Array], name: str, masked: bool = True) -> list[Array]:
        """LayerNorm(query + attention)."""
        weights = np.split(self.state[f"{name}.attention.in_proj_weight"], 3)
        biases = np.split(self.state[f"{name}.attention.in_proj_bias"], 3)
        q = [weights[0] @ (x + p) + biases[0] for x, p in zip(queries, self.position)]
        k = [weights[1] @ (x + p) + biases[1] for x, p in zip(keys, self.position)]
        v = [weights[2] @ x + biases[2] for x in keys]
        width = len(q[0]) // self.heads
        result = []
        for i, query in enumerate(queries):
            seen = [j for j in range(len(keys)) if self.sees(i, j, masked)]
            attended = np.zeros_like(query)
            for head in range(self.heads):
                part = slice(head * width, (head + 1) * width)
                likeness = [math.exp(q[i][part] @ k[j][part] / math.sqrt(width)) for j in seen]
                attended[part] = sum(like * v[j][part] for like, j in zip(likeness, seen)) / sum(likeness)
            result.append(self.norm(query + self.linear(attended, f"{name}.attention.out_proj"), f"{name}.norm"))
        return result

    def feed_forward(self, tokens: list[Array], name: str) -> list[Array]:
        hidden = [np.maximum(self.linear(x, f"{name}.layers.0"), 0) for x in tokens]
        added = [x + self.linear(h, f"{name}.layers.3") for x, h in zip(tokens, hidden)]
        return [self.norm(x, f"{name}.norm") for x in added]

    def encode(self, features: Array, masked: bool = True) -> list[Array]:
        """C×h×w to tokens."""
        pixels = [features[:, row, column] for row in range(self.grid[0]) for column in range(self.grid[1])]
        tokens = [self.linear(x, "transformer.project") for x in pixels]
        for number in range(self.layers("transformer.encoder")):
            name = f"transformer.encoder.{number}"
            tokens = self.feed_forward(self.attend(tokens, tokens, f"{name}.attention", masked), f"{name}.feed_forward")
        return tokens

    def query_decoder(
        self, memory: list[Array], prompt: list[Array] | None = None, masked: tuple[bool, bool] = (True, True)
    ) -> list[Array]:
        """Layer-wise queries, learned or a prompt's."""
        output = memory
        for number in range(self.layers("transformer.decoder.layers")):
            name = f"transformer.decoder.layers.{number}"
            queries = list(self.state[f"{name}.queries"]) if prompt is None else prompt
            queries = self.attend(queries, memory, f"{name}.from_memory", masked[0])
            queries = self.attend(queries, output, f"{name}.from_previous", masked[1])
            output = self.feed_forward(queries, f"{name}.feed_forward")
        return [self.norm(x, "transformer.decoder.norm") for x in output]

    def bidirectional_decoder(self, image: list[Array], prompt: list[Array]) -> list[Array]:
        """Prompt and image in turn; the prompt is what comes out."""
        for number in range(self.layers("transformer.decoder.layers")):
            name = f"transformer.decoder.layers.{number}"
            prompt = self.attend(prompt, image, f"{name}.prompt_from_image")
            prompt = self.feed_forward(prompt, f"{name}.feed_forward")
            image = self.attend(image, prompt, f"{name}.image_from_prompt")
        return self.attend(prompt, image, "transformer.decoder.last", masked=False)

    def restore(self, tokens: list[Array]) -> Array:
        """Tokens to C×h×w."""
        features = np.stack([self.linear(x, "transformer.restore") for x in tokens])  # N C
        return features.T.reshape(-1, *self.grid)

    def refine(self, errors: Array, side: int) -> Array:
        """C×h×w of absolute errors to the probability of each pixel."""
        for first in (0, 4):
            kernel = self.state[f"refiner.layers.{first}.weight"]  # out in 3 3
            padded = np.pad(errors, ((0, 0), (1, 1), (1, 1)))
            height, width = errors.shape[1:]
            convolved = np.zeros((len(kernel), height, width))
            for row in range(height):
                for column in range(width):
                    convolved[:, row, column] = (kernel * padded[:, row : row + 3, column : column + 3]).sum((1, 2, 3))
            norm = {
                key: self.state[f"refiner.layers.{first + 1}.{key}"][:, None, None]
                for key in ("running_mean", "running_var", "weight", "bias")
            }
            normed = (convolved - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5)
            active = np.maximum(normed * norm["weight"] + norm["bias"], 0)
            kernel, bias = (self.state[f"refiner.layers.{first + 3}.{key}"] for key in ("weight", "bias"))
            errors = np.zeros((kernel.shape[1], 2 * height, 2 * width))  # kernel: in out 2 2
            for row in range(2 * height):
                for column in range(2 * width):
                    errors[:, row, column] = active[:, row // 2, column // 2] @ kernel[:, :, row % 2, column % 2] + bias
        logits = np.tensordot(self.state["refiner.layers.8.weight"][0, :, 0, 0], errors, 1)
        logits = enlarged(logits + self.state["refiner.layers.8.bias"][0], side)
        return 1 / (1 + np.exp(-logits))


def enlarged(grid: Array, side: int, corners: bool = True) -> Array:
    """h×w to S×S, bilinear; corners on corners, or pixel centres at half-integers with the border held."""

    def along(values: Array) -> Array:
        result = []
        for index in range(side):
            if corners:
                at = index * (len(values) - 1) / (side - 1)
            else:
                at = min(max((index + 0.5) * len(values) / side - 0.5, 0), len(values) - 1)
            low = min(int(at), len(values) - 2)
            result.append((1 - (at - low)) * values[low] + (at - low) * values[low + 1])
        return np.stack(result)

    return along(along(grid).T).T


def largest_window_mean(anomaly_map: Array, window: int) -> float:
    """Largest mean of any window×window pixels."""
    ends = [range(length - window + 1) for length in anomaly_map.shape]
    return max(anomaly_map[r : r + window, c : c + window].mean() for r in ends[0] for c in ends[1])


def shaken(method: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """With every trained parameter and running statistic away from the ones and zeros it starts with."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in method.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.weight.requires_grad:
                module.running_mean.add_(0.3 * torch.randn_like(module.running_mean))
                module.running_var.mul_(1 + torch.rand_like(module.running_var))
    return method.eval()
