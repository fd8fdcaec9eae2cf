"""Models loaded where a job runs."""

from __future__ import annotations

from typing import Any

from unianom import files
from unianom.data.image import InputPolicy
from unianom.errors import ModelError
from unianom.execution import Execution
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.trained import TrainedMethod
from unianom.model import Model, load
from unianom.options import from_plain


def load_model(folder: str, execution: Execution) -> Model:
    """Load a model from a path or URI, to be run in this way.

    Raises:
        ModelError, OptionError: as `unianom.load`.
    """
    return load(folder, execution.device, execution.engine, execution.search)


def input_policy(folder: str) -> InputPolicy:
    """Return how images become input of the model in a folder, which is not loaded."""
    return from_plain(InputPolicy, files.read_json(files.join(folder, "model.json"))["config"]["input"])


def load_memory_method(folder: str, execution: Execution) -> MemoryMethod:
    """Load the method of a model folder that holds a memory method.

    Raises:
        ModelError: it holds another one, or no usable model.
        OptionError: as `unianom.load`.
    """
    return memory_method(load_model(folder, execution).method)


def memory_method(method: Method) -> MemoryMethod:
    """Return a method that is a memory method.

    Raises:
        ModelError: it is another one.
    """
    if not isinstance(method, MemoryMethod):
        raise ModelError(f"{method.name} has no memory bank; give a model of a memory method")
    return method


def memory_method_class(name: str) -> type[MemoryMethod]:
    """Return the class of a memory method by its name.

    Raises:
        ModelError: the method is not a memory method.
    """
    method = METHODS[name]
    if not issubclass(method, MemoryMethod):
        raise ModelError(f"{name} has no memory bank; give a memory method")
    return method


def make_memory_method(name: str, config: Any) -> MemoryMethod:
    """Make a memory method without a bank.

    Jobs that build banks also do so before they claim an output, for then nothing is left of options that no network
    can be made of.

    Raises:
        ModelError: the method is not a memory method.
        OptionError: options that do not fit its network, or this machine's memory.
        WeightsError: its weights are missing, or do not fit.
    """
    method_class = memory_method_class(name)
    with memory_limit(f"--method: {name}"):
        return method_class(config)


def trained_method(method: Method) -> TrainedMethod:
    """Return a method that is trained.

    Raises:
        ModelError: it is another one.
    """
    if not isinstance(method, TrainedMethod):
        raise ModelError(f"{method.name} is not trained; give a model of a trained method")
    return method
