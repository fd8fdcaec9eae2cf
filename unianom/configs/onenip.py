"""Options of OneNIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unianom.configs.backbone import BackboneConfig, resolve_padding
from unianom.configs.synthesis import SynthesisConfig
from unianom.configs.training import TrainingConfig
from unianom.configs.transformer import TransformerConfig, check_reconstruction_options
from unianom.data.image import InputPolicy
from unianom.options import AtLeastOne, AtLeastZero, NotNegative, Options, Positive, Share

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"feature_loss": "sum", "dice_factor": 2.0, "dice_smoothing": 0.0, "score_pool": 1},
    "reference": {"feature_loss": "mean", "dice_factor": 1.0, "dice_smoothing": 1.0, "score_pool": 16},
}
"""Where text and released code differ. The code's Dice loss lacks the factor 2 of eq. 7 but, by its smoothing, also
learns from images without anomalies, for which the text's is constant; it halves L_rec + L_res of eq. 8; its image
score is the maximum after a mean filter. Two things of the code are in neither preset because they need what is not
known of a test image: prompts by its true category, and a fusion scale from all test maps."""


@dataclass(frozen=True)
class OneNIPConfig(Options):
    """Reconstruction of features, prompted by one normal image (OneNIP); the defaults are the published ones.

    The ablation of the paper (table 4a), row by row: `prompt="none", restoration=False, refiner=False` is UniAD;
    then `prompt="static"`; `prompt="dynamic"`; `prompt="none", restoration=True`; `prompt="dynamic",
    restoration=True`; and the defaults.

    Args:
        preset: "paper" or "reference" (the released code); fills what is left null below.
        backbone: any timm pyramid of feature maps that has the taps; published: EfficientNet-B4.
        input: published: stretched to 224×224; also 256 and 320.
        training: length, batches, optimiser.
        taps: reductions (strides with regard to the image) of the feature maps, fine to coarse.
        grid_reduction: the one of the taps whose grid is the token grid.
        transformer: its size, dropout and feature jitter.
        neighbours: side of the square, in tokens, that attention does not see around each token; 0 for no mask;
            "half" for half the token grid's side, rounded down, as published.
        prompt: what the decoder starts from: the prompt's tokens, updated together with the image's ("dynamic"); the
            prompt's tokens, the same in every layer ("static"); or learned queries, as in UniAD ("none").
        prompt_sampling: prompts while training are random images of the same "category", or, where categories are
            not known, those of "nearest" features.
        pool_size: images kept as prompts for prediction where sampling is "nearest"; else it is one of each category.
        restoration: also learn to restore the features of pseudo-anomalous copies (eq. 5).
        synthesis: how those copies are made.
        refiner: whether reconstruction errors are refined to a map of four times the token grid's side (sec. 3.3).
        refiner_width: channels of its convolutions.
        feature_loss: "sum" of reconstruction and restoration loss (eq. 8) or their "mean".
        dice_factor: of the intersection in the Dice loss; 2 in eq. 7.
        dice_smoothing: added to both sides of its fraction.
        segmentation_weight: λ, of the Dice loss in the total.
        alpha: α, the refiner's share in the anomaly map (eq. 10).
        score_pool: side of the mean filter, in pixels, before the maximum that is the image score; 1 for none.
    """

    usual = ("preset", "backbone", "input", "training")

    presets = PRESETS

    preset: Literal["paper", "reference"] = "paper"
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("tf_efficientnet_b4.aa_in1k"))
    input: InputPolicy = field(default_factory=lambda: InputPolicy(resize="stretch", size=224, crop=None))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    taps: tuple[int, ...] = (2, 4, 8, 16)
    grid_reduction: int = 16
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    neighbours: AtLeastZero | Literal["half"] = "half"
    prompt: Literal["dynamic", "static", "none"] = "dynamic"
    prompt_sampling: Literal["category", "nearest"] = "category"
    pool_size: AtLeastOne = 15
    restoration: bool = True
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    refiner: bool = True
    refiner_width: AtLeastOne = 128
    feature_loss: Literal["sum", "mean"] = "sum"
    dice_factor: Positive = 2.0
    dice_smoothing: NotNegative = 0.0
    segmentation_weight: NotNegative = 0.5
    alpha: Share = 0.5
    score_pool: AtLeastOne = 1

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        return resolve_padding(cls, super().resolve(given))

    def check(self) -> None:
        check_reconstruction_options(self.taps, self.grid_reduction, self.score_pool, self.input.side)
