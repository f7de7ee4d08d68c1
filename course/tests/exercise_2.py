"""Exercise 2: the quantizer."""

import torch
import torch.nn.functional as F
from torch import Tensor

import dar
from course.tests.support import check_close, check_equal

ALL = torch.ones(2, 6, dtype=torch.bool)
UNEVEN = torch.arange(6) < torch.tensor(
    [[1], [5]]
)  # one token of the first image, five of the other


def quantizer() -> dar.VectorQuantizer:
    """64 rows of very different lengths, which have to be normalised."""
    vq = dar.VectorQuantizer(64, 8)
    with torch.no_grad():
        vq.embedding.weight.mul_(torch.rand(64, 1) * 5 + 0.1)
    return vq


def unit(x: Tensor) -> Tensor:
    return x.detach().double() / x.detach().double().norm(dim=-1, keepdim=True)


def expected_loss(vq, f: Tensor, keep: Tensor) -> float:
    distances = (unit(f)[:, :, None] - unit(vq.embedding.weight)).square().mean(-1)  # [B, N, V]
    nearest = distances.amin(-1)
    return nearest[keep].mean().item()


def test_a_feature_is_nearest_to_the_row_it_points_at():
    vq = quantizer()
    f = 0.01 * vq.embedding.weight[None]  # short features in the directions of all rows
    check_equal("rows as features", vq.nearest_code(f)[0], list(range(64)))


def test_the_nearest_row_is_nearest_by_distance():
    vq = quantizer()
    f = torch.randn(4, 100, 8) * torch.rand(4, 100, 1)
    codes = vq.nearest_code(f)
    assert codes.dtype == torch.int64, f"tokens are {codes.dtype}, not int64"
    distances = (unit(f)[:, :, None] - unit(vq.embedding.weight)).square().sum(-1)
    check_equal("400 features", codes, distances.argmin(-1))


def test_the_search_has_no_gradient():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    assert not vq.nearest_code(f).requires_grad, "the tokens have a gradient"
    codes = vq(f, ALL)[1]
    check_equal("forward's tokens are nearest_code's", codes, vq.nearest_code(f))


def test_z_has_the_value_of_the_row():
    vq = quantizer()
    f = torch.randn(2, 6, 8)
    z, codes, _, _ = vq(f, ALL)
    check_close("z", z, unit(vq.embedding.weight)[codes])


def test_z_passes_its_gradient_to_the_normalised_feature():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    weight = torch.randn(2, 6, 8)
    (expected,) = torch.autograd.grad((F.normalize(f, dim=-1) * weight).sum(), f)
    z = vq(f, ALL)[0]
    assert z.requires_grad, "z has no gradient"
    (actual,) = torch.autograd.grad((z * weight).sum(), f)
    check_close("the gradient of z with respect to f", actual, expected)


def test_the_rows_learn_nothing_through_z():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    vq(f, ALL)[0].pow(3).sum().backward()
    gradient = vq.embedding.weight.grad
    assert gradient is None or not gradient.any(), "z gives the codebook a gradient"


def test_both_losses_are_mean_squared_distances():
    vq = quantizer()
    f = torch.randn(2, 6, 8) * 3
    _, _, l_vq, l_commit = vq(f, ALL)
    check_close("l_vq", l_vq, expected_loss(vq, f, ALL))
    check_close("l_commit", l_commit, expected_loss(vq, f, ALL))


def test_l_vq_moves_the_rows_alone():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    _, codes, l_vq, _ = vq(f, ALL)
    l_vq.backward()
    assert f.grad is None or not f.grad.any(), "l_vq moves the features"
    moved = vq.embedding.weight.grad.any(-1).nonzero()[:, 0]
    check_equal("the rows that l_vq moves", moved, sorted(set(codes.flatten().tolist())))


def test_l_commit_moves_the_features_alone():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    vq(f, ALL)[3].backward()
    gradient = vq.embedding.weight.grad
    assert gradient is None or not gradient.any(), "l_commit moves the rows"
    assert f.grad.any(-1).all(), "l_commit does not move every feature"


def test_losses_are_means_over_the_kept_tokens_of_the_batch():
    vq = quantizer()
    f = torch.randn(2, 6, 8)
    _, _, l_vq, l_commit = vq(f, UNEVEN)
    check_close("l_vq", l_vq, expected_loss(vq, f, UNEVEN))
    check_close("l_commit", l_commit, expected_loss(vq, f, UNEVEN))


def test_tokens_that_are_not_kept_get_no_gradient_from_the_losses():
    vq = quantizer()
    f = torch.randn(2, 6, 8, requires_grad=True)
    vq(f, UNEVEN)[3].backward()
    assert f.grad[UNEVEN].any(-1).all(), "a kept token has no gradient"
    assert not f.grad[~UNEVEN].any(), "a token that is not kept has a gradient"


def test_all_is_float32_under_autocast():
    vq = dar.VectorQuantizer(1024, 8)
    f = torch.randn(4, 200, 8)
    keep = torch.ones(4, 200, dtype=torch.bool)
    z, codes, l_vq, _ = vq(f, keep)
    with torch.autocast("cpu", torch.bfloat16):
        low_z, low_codes, low_l_vq, _ = vq(f, keep)
        check_equal("nearest_code", vq.nearest_code(f), codes)
    check_equal("tokens", low_codes, codes)
    assert low_z.dtype == torch.float32, f"z is {low_z.dtype}"
    check_close("z", low_z, z, 1e-6)
    check_close("l_vq", low_l_vq, l_vq, 1e-6)
