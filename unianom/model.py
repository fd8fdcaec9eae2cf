"""The model folder: a method with its weights, bank and threshold, ready to predict.

`model.json` (what it is), `weights.safetensors` (every parameter and statistic), `bank/` (memory methods),
`calibrator.safetensors` (where scores are calibrated). No file is a pickle; loading runs no code from the folder.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps

from unianom import files
from unianom.backbones import state_faults
from unianom.calibration import Calibration, Calibrator
from unianom.configs.backbone import with_padding_of_old
from unianom.configs.calibration import CalibrationConfig
from unianom.data.image import (
    ImageLimits,
    InputPolicy,
    check_bits,
    decode_image,
    decode_prepared,
    prepare_image,
    spread_bits,
)
from unianom.data.tensors import normalise
from unianom.errors import DataError, ImageError, ModelError, OptionError, UnianomError, image_error, storage_error
from unianom.execution import Engine, Execution, Search
from unianom.folding import fold_batch_norm
from unianom.memory.index import MemoryBank
from unianom.memory_limit import memory_limit
from unianom.methods import METHODS, MemoryMethod, Method, Prediction
from unianom.methods.base import ScoredImages
from unianom.options import from_plain, to_plain
from unianom.thresholds import DecisionRule, Threshold, number_names

FORMAT_VERSION = 1

OPTIONAL_KEYS = ("calibrator", "decision_rule", "category_thresholds", "normal_scores")

KEYS = ("method", "config", "categories", "threshold", "provenance", "weights_sha256", "bank_sha256")
"""What `model.json` holds beside its format version; a calibrated model also has "calibrator", and one that
a rule of decision was stored in "decision_rule". Thresholds of single categories are "category_thresholds", and the
scores they all were fitted to, "normal_scores"."""

_SHAPES: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "categories": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "provenance": lambda value: isinstance(value, dict),
}
"""What the entries are that no class checks as it is made of them."""

CALIBRATOR = "calibrator.safetensors"

AnyImage = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class ImageResult:
    """What a model says of one image.

    Attributes:
        score: raw image score; higher is more anomalous.
        anomaly_map: S×S float32 at the model's input resolution, raw.
        decision: "pass", "review" or "fail" by the model's decision rule, else "pass" or "fail" by its threshold for
            the image's category, or for all; None if it has neither, or if the rule has no thresholds for the image's
            category or that was not given.
        calibrated_score: of the calibrated map; None if the model has no calibrator.
        calibrated_map: S×S float32; None if the model has no calibrator.
    """

    score: float
    anomaly_map: np.ndarray
    decision: str | None
    calibrated_score: float | None = None
    calibrated_map: np.ndarray | None = None


@dataclass
class Model:
    """A fitted method with what is needed to use it.

    Attributes:
        method: the method, in evaluation mode.
        categories: those it was fitted on, sorted.
        threshold: of all categories together, from normal scores; None if none was fitted.
        provenance: data manifest, options, seeds and versions it came from.
        digest: SHA-256 of `model.json` once saved or loaded; names exactly this model.
        calibrator: brings scores to a scale that all categories share; None if none was fitted.
        decision_rule: decides in place of the thresholds; None if none was stored.
        category_thresholds: those of single categories, which judge images that are known to be of them.
        normal_scores: the scores that the thresholds were fitted to, by category, ascending.
    """

    method: Method
    categories: list[str] = field(default_factory=list)
    threshold: Threshold | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    calibrator: Calibrator | None = None
    decision_rule: DecisionRule | None = None
    category_thresholds: dict[str, Threshold] = field(default_factory=dict)
    normal_scores: dict[str, list[float]] = field(default_factory=dict)

    def predict(
        self,
        images: Sequence[AnyImage],
        batch_size: int = 8,
        limits: ImageLimits | None = None,
        categories: Sequence[str] | None = None,
        bits: int | None = None,
    ) -> list[ImageResult]:
        """Score images given as paths, URIs, encoded bytes, H×W×3 or H×W uint8 arrays, or Pillow images.

        Args:
            images: a list of them; of none the result is none.
            batch_size: images in one forward pass.
            limits: what an image may cost. Of time there is no limit here: `seconds` holds in jobs only.
            categories: of the images, for thresholds of single categories; only a calibrator or a decision rule that
                goes by category needs them.
            bits: that files with 16 bits a sample make use of, where they do not state it; as given to ingest.

        Raises:
            ImageError: an image is missing or cannot be read; names it by its place in the list.
            OptionError: an array is empty or not uint8 of such a shape, something is no image at all (named by its
                place in the list), or `images` or `categories` is not a list.
            DataError: categories are needed and not given, or unknown to the calibrator.
        """
        images = _as_list(images)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        check_bits(bits)
        if not isinstance(limits, ImageLimits | None):
            raise OptionError(f"limits is {_kind(limits)}; give an ImageLimits")
        if categories is not None:
            if isinstance(categories, str | Mapping) or not (
                hasattr(categories, "__len__") and hasattr(categories, "__getitem__")
            ):
                raise OptionError(f"categories is {_kind(categories)}; give a list with one name for each image")
            if len(categories) != len(images):
                raise OptionError(f"{len(categories)} categories for {len(images)} images; give one for each")
        results: list[ImageResult] = []
        for batch in self._prepared(images, batch_size, limits or ImageLimits(), bits):
            tensor = normalise(batch, self.method.input).to(self.method.device)
            names = None if categories is None else categories[len(results) : len(results) + len(batch)]
            known: Sequence[str | None] = [None] * len(batch) if names is None else names
            prediction, calibration = self.examine(tensor, names)
            scores, maps = prediction.score.cpu().tolist(), prediction.anomaly_map.cpu().numpy()
            if not np.isfinite(scores).all():
                self.method.check_finite(tensor)
            common: Sequence[float | None] = [None] * len(batch)
            common_maps: Sequence[np.ndarray | None] = [None] * len(batch)
            if calibration is not None:
                common = calibration.score.cpu().tolist()
                common_maps = list(calibration.maps(prediction.anomaly_map).cpu().numpy())
            results += [
                ImageResult(score, own, self.decide(score, value, category), value, calibrated)
                for score, own, value, calibrated, category in zip(
                    scores, maps, common, common_maps, known, strict=True
                )
            ]
        return results

    def prepare(
        self, images: Sequence[AnyImage], limits: ImageLimits | None = None, bits: int | None = None
    ) -> list[np.ndarray]:
        """Return images as the network sees them, before their values are normalised: scaled, cut and padded, S×S×3
        uint8. Anomaly maps lie over these; `unianom.data.tensors.normalise` makes the network's input of them.

        Args:
            images, limits, bits: as of `predict`.

        Raises:
            ImageError, OptionError: as `predict`.
        """
        images = _as_list(images)
        check_bits(bits)
        return [image for batch in self._prepared(images, 1, limits or ImageLimits(), bits) for image in batch]

    def decide(self, score: float, calibrated_score: float | None, category: str | None) -> str | None:
        """Decide what becomes of one image; see `ImageResult.decision`.

        Raises:
            DataError: a score is NaN or infinite, or the rule judges calibrated scores and there is none.
        """
        rule = self.decision_rule
        if rule is not None:
            return rule.decide(score, calibrated_score, category) if rule.knows(category) else None
        threshold = self._threshold_of(category)
        return None if threshold is None else str(threshold.decide(score))

    def decide_each(
        self, scores: np.ndarray, calibrated_scores: np.ndarray | None, categories: Sequence[str | None]
    ) -> np.ndarray:
        """Decide for n images at once, for each as `decide` does.

        Args:
            scores, calibrated_scores: (n,); None where there are no calibrated ones.
            categories: n names; None for an image whose category is not known.

        Returns:
            (n,) objects: "pass", "review", "fail" or None.

        Raises:
            DataError: as `decide`.
        """
        rule = self.decision_rule
        names, places = number_names(categories)
        thresholds = [self._threshold_of(name) for name in names]
        decided = np.array([rule.knows(n) if rule else t is not None for n, t in zip(names, thresholds)], bool)
        rows = np.flatnonzero(decided[places])
        decisions = np.full(len(scores), None, object)
        if rule is not None:
            calibrated = None if calibrated_scores is None else calibrated_scores[rows]
            decisions[rows] = rule.judge(scores[rows], calibrated, [categories[row] for row in rows.tolist()]).decision
            return decisions
        for number, threshold in enumerate(thresholds):
            if threshold is not None:
                own = places == number
                decisions[own] = threshold.decide(scores[own])
        return decisions

    def _threshold_of(self, category: str | None) -> Threshold | None:
        return self.threshold if category is None else self.category_thresholds.get(category, self.threshold)

    @torch.inference_mode()
    def examine(
        self, images: torch.Tensor, categories: Sequence[str] | None = None
    ) -> tuple[Prediction, Calibration | None]:
        """Predict and, if there is a calibrator, calibrate B×3×S×S normalised images.

        Raises:
            OptionError, ModelError, DataError: see `Method.predict` and `Calibrator.calibrate`.
        """
        prediction = self.method.predict(images)
        return prediction, None if self.calibrator is None else self.calibrator.calibrate(prediction, categories)

    @torch.inference_mode()
    def score_images(
        self, images: torch.Tensor, categories: Sequence[str] | None = None
    ) -> tuple[ScoredImages, Calibration | None]:
        """Score and, if there is a calibrator, calibrate B×3×S×S normalised images; see `Method.score_images`.

        Raises:
            OptionError, ModelError, DataError: as `examine`.
        """
        if self.calibrator is not None:  # which takes its score from the map
            prediction, calibration = self.examine(images, categories)
            return ScoredImages.of(prediction), calibration
        return self.method.score_images(images), None

    def _prepared(
        self, images: Sequence[AnyImage], batch_size: int, limits: ImageLimits, bits: int | None
    ) -> Iterator[list[np.ndarray]]:
        """Yield batches of S×S×3 uint8, decoded one batch ahead of the network."""

        def prepare(number: int) -> np.ndarray:
            try:
                return _to_input(images[number], self.method.input, limits, bits)
            except ImageError as error:
                raise ImageError(error.status, f"images[{number}]: {error}") from error
            except OptionError as error:
                raise OptionError(f"images[{number}]: {error}") from error

        def prepare_batch(start: int) -> list[np.ndarray]:
            return [prepare(number) for number in range(start, min(start + batch_size, len(images)))]

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(prepare_batch, 0)
            for start in range(0, len(images), batch_size):
                batch = ahead.result()
                ahead = pool.submit(prepare_batch, start + batch_size)  # beyond the last image: an empty one
                yield batch

    def fold(self) -> None:
        """Fold batch norm into convolutions: the same predictions, up to rounding, from fewer operations. The model can
        then neither be saved nor trained.

        Raises:
            ModelError: predictions would change, as in networks that do not call their parts in order.
        """
        side = self.method.input.side
        probe = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.method.device)
        before = self.method.predict(probe)
        fold_batch_norm(self.method)
        after = self.method.predict(probe)
        for one, other in ((after.anomaly_map, before.anomaly_map), (after.score, before.score)):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
                raise ModelError(
                    f"{self.method.name}: batch norm of {self.method.config.backbone.name} cannot be folded into its "
                    f"convolutions; leave out fold_batch_norm"
                )

    def save(self, uri: str | os.PathLike[str]) -> None:
        """Write the model folder; `model.json` comes last, so a folder without one is unfinished."""
        files.remove(files.join(uri, "model.json"))
        weights = {key: value.contiguous().cpu() for key, value in self.method.state_dict().items()}
        content = safetensors.torch.save(weights)
        files.write_bytes(files.join(uri, "weights.safetensors"), content)
        bank = None
        if isinstance(self.method, MemoryMethod) and self.method.bank is not None:
            self.method.bank.save(files.join(uri, "bank"))
            bank = files.sha256_file(files.join(uri, "bank", "manifest.json"))
        else:
            files.remove(files.join(uri, "bank"))  # of a model that lay here before
        calibrator = None
        if self.calibrator is not None:
            calibrator = _save_calibrator(uri, self.calibrator)
        else:
            files.remove(files.join(uri, CALIBRATOR))
        own = {name: threshold.to_dict() for name, threshold in sorted(self.category_thresholds.items())}
        description = {
            "format_version": FORMAT_VERSION,
            "method": self.method.name,
            "config": to_plain(self.method.config),
            "categories": self.categories,
            "threshold": None if self.threshold is None else self.threshold.to_dict(),
            "provenance": self.provenance,
            "weights_sha256": files.sha256_of(content),
            "bank_sha256": bank,
            **({"category_thresholds": own} if own else {}),
            **({"normal_scores": self.normal_scores} if self.normal_scores else {}),
            **({} if calibrator is None else {"calibrator": calibrator}),
            **({} if self.decision_rule is None else {"decision_rule": self.decision_rule.to_dict()}),
        }
        files.write_json(files.join(uri, "model.json"), description)
        self.digest = files.sha256_file(files.join(uri, "model.json"))

    @staticmethod
    def add_calibrator(uri: str, calibrator: Calibrator, provenance: dict[str, Any]) -> None:
        """Put a calibrator into a finished model folder, or in the place of another one there; nothing else of the
        model is written.

        Args:
            uri: the model folder.
            calibrator: fitted.
            provenance: where it came from, kept under "calibration".
        """
        path = files.join(uri, "model.json")
        description = files.read_json(path)
        if description.pop("calibrator", None) is not None:
            files.write_json(path, description)  # no moment at which the folder names a file it does not hold
        content = _save_calibrator(uri, calibrator)
        description = without_rule(description)  # it was fitted to scores that may no longer be the same
        description["provenance"] = {**description["provenance"], "calibration": provenance}
        files.write_json(path, {**description, "calibrator": content})


def _as_list(images: Any) -> Sequence[AnyImage]:
    """Return, as a sequence, the images that `Model.predict` was given.

    Raises:
        OptionError: it is a single image, or nothing with a place for every image.
    """
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image):
        raise OptionError("predict takes a list of images; put a single image into a list")
    if isinstance(images, np.ndarray | torch.Tensor):
        raise OptionError(
            f"predict takes a list of images, got {_kind(images)}; put a single image into a list, and give a batch as "
            f"a list of H×W×3 uint8 arrays"
        )
    if isinstance(images, Sequence):
        return images
    if isinstance(images, Mapping) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise OptionError(f"predict takes a list of images, got {_kind(images)}; make a list of it")
    return list(images)  # such as a column of a data frame, whose own numbers need not count from 0


def _kind(value: Any) -> str:
    """Describe, for a message, a value that was given in place of something else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    return f"'{value}'" if isinstance(value, str) else type(value).__name__


def _to_input(image: AnyImage, policy: InputPolicy, limits: ImageLimits, bits: int | None) -> np.ndarray:
    """Convert any form of image that `Model.predict` takes to S×S×3 uint8 input; `bits` as there, errors as of
    `to_pixels`."""
    if isinstance(image, Image.Image | np.ndarray):
        return prepare_image(to_pixels(image, limits), policy)

    def decode(content: bytes) -> np.ndarray:
        return decode_prepared(content if bits is None else spread_bits(content, bits, limits), policy, limits)

    return _of_file(image, decode)


def to_pixels(image: AnyImage, limits: ImageLimits, bits: int | None = None) -> np.ndarray:
    """Convert any form of image that `Model.predict` takes to H×W×3 uint8; `bits` as there.

    Raises:
        ImageError: the file is missing or may not be read, or as `decode_image`; also of a Pillow image that is opened
            but not read yet.
        OptionError: an array is empty or not uint8 of such a shape, a Pillow image has no pixels or more than 8 bits,
            or it is no image at all.
    """
    if isinstance(image, Image.Image):
        return _pillow_pixels(image, limits)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            cure = "" if image.dtype == np.uint8 else "; scale its values to 0…255 and give image.astype(numpy.uint8)"
            raise OptionError(f"an image array must be H×W or H×W×3 uint8, got {image.shape} {image.dtype}{cure}")
        if not image.size:
            raise OptionError(f"an image array of shape {image.shape} has no pixels; check how it was cut out")
        plain = np.asarray(image)  # a matrix has two dimensions whatever is done to it
        return np.repeat(plain[:, :, None], 3, axis=2) if plain.ndim == 2 else plain

    def decode(content: bytes) -> np.ndarray:
        return decode_image(content if bits is None else spread_bits(content, bits, limits), limits).pixels

    return _of_file(image, decode)


def _of_file(image: Any, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """Decode an image that is given as encoded bytes, path or URI; an error names the file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if not isinstance(image, str | os.PathLike):
        raise OptionError(f"an image is a path, URI, bytes, H×W×3 uint8 array or Pillow image, not {_kind(image)}")
    try:
        return decode(_read_file(image))
    except ImageError as error:
        known = os.fspath(image) in str(error)
        raise error if known else ImageError(error.status, f"{os.fspath(image)}: {error}") from error


def _pillow_pixels(image: Image.Image, limits: ImageLimits) -> np.ndarray:
    """Convert a Pillow image to H×W×3 uint8; one that is opened but not read yet is read here."""
    if image.mode.startswith(("I", "F")):
        raise OptionError(f"a Pillow image of mode {image.mode} would be clipped to 8 bits; give its file or bytes")
    width, height = image.size
    if not width * height:
        raise OptionError(f"a Pillow image of {width} × {height} has no pixels; check how it was cut out")
    if width * height > limits.max_pixels:
        raise ImageError("too_large", f"{width} x {height} = {width * height} pixels; the limit is {limits.max_pixels}")
    try:
        image.load()
        # a palette's transparency needs RGBA in between; alpha is dropped either way, as from a file
        upright = ImageOps.exif_transpose(image)
        return np.asarray((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))
    except Exception as error:  # a decoder raises whatever its parser stumbled over, a closed file something else
        name = getattr(image, "filename", "")
        what = f"the Pillow image of {os.fspath(name)}" if name else "the Pillow image"
        raise ImageError(
            "corrupt", f"cannot read {what}: {error}; give a whole image whose file is still open"
        ) from error


def _read_file(uri: str | os.PathLike[str]) -> bytes:
    """Return the content of an image file.

    Raises:
        ImageError: there is no such file, it is a folder, or it may not be read.
        OptionError: no file system is known for the URI.
    """
    name = os.fspath(uri)
    if name.endswith("/"):
        raise ImageError("missing", f"{name} names a folder; name the images in it")
    try:
        return files.read_bytes(uri)
    except DataError as error:
        raise OptionError(str(error)) from error
    except OSError as error:
        known = image_error(uri, error) or storage_error(error)
        raise known or ImageError("missing", f"cannot read {name!r}: {error}") from error


def load(
    uri: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    engine: Engine = "pytorch",
    search: Search = "auto",
) -> Model:
    """Load a model folder from a path or URI.

    Args:
        uri: the folder that holds `model.json`.
        device: where its network runs; "cuda" without a GPU is an error, never a silent fallback.
        engine, search: as of `Execution`.

    Raises:
        ModelError: the folder is missing, unfinished, damaged or of another format version.
        OptionError: the device is not there, or the engine or the search cannot be; EngineError, one of these, where
            the engine is not installed, or cannot compute this model's encoder as PyTorch does.
    """
    execution = Execution(str(device), engine, search)
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device {device}: PyTorch knows no such device; use cpu or cuda") from error
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device}: this machine has no usable CUDA GPU; use device=cpu")
    path = files.join(uri, "model.json")
    try:
        content = files.read_bytes(path)  # read once: a rule may be written into it meanwhile, with another digest
        description = files.parse_json(content)
    except FileNotFoundError as error:
        found = ", ".join(files.list_names(uri)) or "nothing"
        raise ModelError(
            f"no model.json in {os.fspath(uri)} (found: {found}); give the folder jobs/train.py wrote"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    found_version = description.get("format_version") if isinstance(description, dict) else None
    if found_version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {found_version}, this unianom reads {FORMAT_VERSION}; "
            f"fit the model again or use the unianom that wrote it"
        )
    if absent := [key for key in KEYS if key not in description]:
        raise ModelError(f"{path} is damaged: it has no {', '.join(absent)}; copy it again or fit the model again")
    if unknown := sorted(set(description) - {"format_version", *KEYS, *OPTIONAL_KEYS}):
        near = get_close_matches(unknown[0], [*KEYS, *OPTIONAL_KEYS], 1)
        raise ModelError(
            f"{path} holds the unknown key '{unknown[0]}'{f' (did you mean {near[0]}?)' if near else ''}; remove it, "
            f"or use the unianom that wrote it"
        )
    if wrong := [key for key, fits in _SHAPES.items() if not fits(description[key])]:
        raise ModelError(
            f"{path} is damaged: its {wrong[0]} cannot be {str(description[wrong[0]])[:60]!r}; copy it again or fit "
            f"the model again"
        )
    if description["method"] not in METHODS:
        raise ModelError(f"{path} names method '{description['method']}'; known: {', '.join(sorted(METHODS))}")
    cls = METHODS[description["method"]]
    try:
        config: Any = from_plain(cls.Config, with_padding_of_old(description["config"]))
        # built with random weights, which the folder's own replace at once: nothing is downloaded
        blank = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights="random"))
    except _WRONG_VALUES as error:
        raise ModelError(f"the config in {path} is not valid: {error}; fit the model again") from error
    weights = files.join(uri, "weights.safetensors")
    state = _read_state(weights, description["weights_sha256"], "fit the model again")
    try:
        with memory_limit("its network", _most_memory(state), _most_tensors(state)):
            method = cls(blank)
    except (*_WRONG_VALUES, RuntimeError, MemoryError) as error:
        raise ModelError(f"the config in {path} is not valid: {error}; fit the model again") from error
    method.config = config
    method.size_buffers(state)
    _check_state(weights, method.state_dict(), state, "fit the model again")
    method.load_state_dict(state)
    if description["bank_sha256"] is not None:
        if not isinstance(method, MemoryMethod):
            raise ModelError(f"{path} names a memory bank, which {cls.name} does not have; fit the model again")
        manifest = files.join(uri, "bank", "manifest.json")
        if not files.exists(manifest) or files.sha256_file(manifest) != description["bank_sha256"]:
            raise ModelError(f"{manifest} is missing or not the one this model was saved with; fit the model again")
        method.bank = MemoryBank.load(files.join(uri, "bank"))
    method.eval().to(device)
    method.execution = execution
    if engine != "pytorch":
        from unianom.encoder_engine import compile_encoders  # only here, as it draws pictures to compare on

        compile_encoders(method, engine)
    try:
        threshold = None if description["threshold"] is None else Threshold.from_dict(description["threshold"])
        own = {name: Threshold.from_dict(one) for name, one in (description.get("category_thresholds") or {}).items()}
        scores = description.get("normal_scores") or {}
        normal_scores = {name: [float(score) for score in values] for name, values in scores.items()}
        rule = description.get("decision_rule")
        decision_rule = None if rule is None else DecisionRule.from_dict(rule)
    except (UnianomError, *_WRONG_VALUES) as error:
        raise ModelError(f"a threshold in {path} is not valid: {error}; fit the model again") from error
    return Model(
        method,
        description["categories"],
        threshold,
        description["provenance"],
        files.sha256_of(content),
        None if description.get("calibrator") is None else _load_calibrator(uri, description["calibrator"], device),
        decision_rule,
        own,
        normal_scores,
    )


_WRONG_VALUES = (OptionError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What options raise for values, and what comes of values of a wrong type."""


def _most_memory(state: dict[str, torch.Tensor]) -> int:
    """Return the most bytes that the network with these weights may take while it is built.

    Beside the weights these are buffers that are not saved, and what initialising takes.
    """
    return 4 * sum(value.nbytes for value in state.values()) + (1 << 30)


def _most_tensors(state: dict[str, torch.Tensor]) -> int:
    """Return the most tensors that may be made while the network with these weights is built.

    Each weight takes a few, and parts of an encoder that are cut off afterwards as many as the rest of it.
    """
    return 50 * len(state) + 5000


def store_rule(uri: str | os.PathLike[str], rule: DecisionRule, provenance: dict[str, Any]) -> None:
    """Put a decision rule into a finished model folder, or in the place of another one there, whole or not at all;
    weights, bank and calibrator are not touched.

    Args:
        uri: the model folder.
        rule: decides from now on in place of the threshold.
        provenance: where the rule comes from.
    """
    path = files.join(uri, "model.json")
    description = without_rule(files.read_json(path))
    description["provenance"] = {**description["provenance"], "decision_rule": provenance}
    files.write_json(path, {**description, "decision_rule": rule.to_dict()})


def without_rule(description: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `model.json` as it is without a decision rule."""
    bare = {key: value for key, value in description.items() if key != "decision_rule"}
    bare["provenance"] = {key: value for key, value in bare["provenance"].items() if key != "decision_rule"}
    return bare


def _save_calibrator(uri: str | os.PathLike[str], calibrator: Calibrator) -> dict[str, Any]:
    """Write a calibrator's weights; gives what `model.json` says of it."""
    state = {key: value.contiguous().cpu() for key, value in calibrator.state_dict().items()}
    content = safetensors.torch.save(state)
    files.write_bytes(files.join(uri, CALIBRATOR), content)
    return {"config": to_plain(calibrator.config), **calibrator.plain(), "sha256": files.sha256_of(content)}


def _load_calibrator(
    uri: str | os.PathLike[str], description: dict[str, Any], device: str | torch.device
) -> Calibrator:
    path = files.join(uri, CALIBRATOR)
    try:
        config = from_plain(CalibrationConfig, description["config"])
        channels, (height, width) = description["channels"], description["grid"]
        expected = description["sha256"]
        state = _read_state(path, expected, "calibrate again")
        with memory_limit("its head", _most_memory(state), _most_tensors(state)):
            calibrator = Calibrator(config, description["categories"], channels, (height, width))
    except (*_WRONG_VALUES, RuntimeError, MemoryError) as error:
        raise ModelError(
            f"the calibrator in model.json of {os.fspath(uri)} is not valid: {error}; calibrate again"
        ) from error
    _check_state(path, calibrator.state_dict(), state, "calibrate again")
    calibrator.load_state_dict(state)
    return calibrator.eval().to(device)


def _read_state(path: str, sha256: str, remedy: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file that must be the one `model.json` names."""
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; copy the whole model folder or {remedy}") from error
    if files.sha256_of(content) != sha256:
        raise ModelError(f"{path} is damaged: its checksum differs from model.json; copy it again")
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # a damaged file fails in the parser, each in its own way
        raise ModelError(f"{path} holds no weights that can be read: {error}; {remedy}") from error


def _check_state(path: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], remedy: str) -> None:
    if faults := state_faults(own, state):
        raise ModelError(f"{path} does not fit the config in model.json; {faults}; {remedy}")


def versions() -> dict[str, str]:
    """Return the versions of what a model's numbers depend on."""
    found = {name: version(name) for name in ("unianom", "torch", "timm", "numpy", "pillow")}
    return {"python": platform.python_version(), **found}


def is_model(uri: str | os.PathLike[str]) -> bool:
    """Return whether a finished model folder lies at `uri`."""
    return files.exists(files.join(uri, "model.json"))


def local_copy(uri: str, folder: Path) -> str:
    """Return a model folder on this machine's disk: `uri` itself if it is local, else a copy below `folder`."""
    if files.is_local(uri):
        return files.full_uri(uri)
    fs, path = files.resolve(uri)
    fs.get(path, str(folder), recursive=True)
    return str(folder)
