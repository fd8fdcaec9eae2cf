import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from unianom.errors import DataError, OptionError
from unianom.memory.masking import back_patch_mask, smooth_attention, soft_mask


def _attention(batch=3, height=9, width=12, seed=0):
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) ** 4


@pytest.mark.parametrize("kernel", [1, 3, 7, 13])
def test_smoothing_is_a_zero_padded_mean_filter(kernel):
    attention = _attention()
    expected = [uniform_filter(image.double().numpy(), kernel, mode="constant", cval=0) for image in attention]
    assert np.allclose(smooth_attention(attention, kernel), np.stack(expected), atol=1e-6)


def test_padding_counts_in_the_mean():
    smooth = smooth_attention(torch.ones(1, 28, 28), 7)[0]
    assert smooth[14, 14] == pytest.approx(1)
    assert smooth[0, 0] == pytest.approx(16 / 49)  # 4 × 4 cells of 7 × 7 lie inside
    assert smooth[0, 14] == pytest.approx(28 / 49)


def test_mask_is_what_lies_above_the_threshold():
    attention = torch.tensor([[[1.0, 0.5, 0.1, 0.05]]])
    assert back_patch_mask(attention, kernel=1, threshold=0.1).tolist() == [[[True, True, False, False]]]
    assert back_patch_mask(attention, kernel=1, threshold=0.0).all()
    # kernel 3 on one row of four: sums over the window (rows above and below are zero) are 1.5, 1.6, .65, .15
    soft = soft_mask(attention, kernel=3)
    assert soft[0, 0].tolist() == pytest.approx([1.5 / 1.6, 1, 0.65 / 1.6, 0.15 / 1.6])
    assert back_patch_mask(attention, kernel=3, threshold=0.1).tolist() == [[[True, True, True, False]]]


def test_scope_of_the_maximum():
    attention = torch.stack([torch.full((5, 5), 1.0), torch.full((5, 5), 0.01)])
    assert back_patch_mask(attention, kernel=1).all()
    by_batch = back_patch_mask(attention, kernel=1, scope="batch")
    assert by_batch[0].all()
    assert not by_batch[1].any()


def test_image_scope_does_not_depend_on_the_batch():
    attention = _attention(batch=5)
    alone = torch.cat([back_patch_mask(image[None], threshold=0.5) for image in attention])
    assert torch.equal(back_patch_mask(attention, threshold=0.5), alone)
    assert 0.1 < alone.float().mean() < 0.9


def test_soft_mask_ranges_to_one():
    soft = soft_mask(_attention())
    assert torch.equal(soft.amax(dim=(1, 2)), torch.ones(3))
    assert soft.min() >= 0


def test_half_precision_attention_is_smoothed_in_float32():
    attention = torch.full((1, 28, 28), 1e-6)
    mask = back_patch_mask(attention.half(), threshold=0.5)
    assert torch.equal(mask, back_patch_mask(attention, threshold=0.5))


@pytest.mark.parametrize("kernel", [0, 2, -1])
def test_even_kernel_is_refused(kernel):
    with pytest.raises(OptionError, match="odd"):
        back_patch_mask(_attention(), kernel=kernel)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_impossible_attention_is_refused(value):
    attention = _attention()
    attention[1, 2, 3] = value
    with pytest.raises(DataError, match="NaN"):
        back_patch_mask(attention)


def test_attention_without_any_object_is_refused():
    attention = _attention()
    attention[1] = 0
    with pytest.raises(DataError, match="zero everywhere"):
        back_patch_mask(attention)
    assert not back_patch_mask(attention, scope="batch")[1].any()


def test_wrong_options_and_shapes_are_refused():
    with pytest.raises(OptionError, match="threshold"):
        back_patch_mask(_attention(), threshold=1.0)
    with pytest.raises(OptionError, match="scope"):
        back_patch_mask(_attention(), scope="class")
    with pytest.raises(DataError, match="shape"):
        back_patch_mask(torch.rand(4, 4))
