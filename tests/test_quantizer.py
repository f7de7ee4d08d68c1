"""Chapter 2, the quantizer: nearest codes on the unit sphere, straight-through gradient, the two losses."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dar


def quantizer(codebook_size: int = 64, code_dim: int = 8) -> dar.VectorQuantizer:
    """With rows of very different lengths, so that forgetting to normalise them shows."""
    vq = dar.VectorQuantizer(codebook_size, code_dim)
    with torch.no_grad():
        vq.embedding.weight.mul_(torch.rand(codebook_size, 1) * 5 + 0.1)
    return vq


def unit(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double() / x.detach().double().pow(2).sum(-1, keepdim=True).sqrt()


def test_codes_live_on_the_unit_sphere():
    vq = quantizer()
    torch.testing.assert_close(vq.codebook().double(), unit(vq.embedding.weight), rtol=0, atol=1e-6)
    codes = torch.randint(64, (2, 5))
    assert vq.lookup(codes).shape == (2, 5, 8)
    torch.testing.assert_close(vq.lookup(codes), vq.codebook()[codes])


def test_nearest_is_the_brute_force_euclidean_nearest_on_the_sphere():
    vq, f = quantizer(), torch.randn(4, 100, 8) * torch.rand(4, 100, 1)
    distances = (unit(f)[:, :, None] - unit(vq.embedding.weight)).pow(2).sum(-1)  # [4, 100, 64]
    codes = vq.nearest_code(f)
    assert codes.shape == (4, 100) and codes.dtype == torch.int64
    assert torch.equal(codes, distances.argmin(-1))


def test_a_feature_is_nearest_to_the_code_it_points_at():
    vq = quantizer()
    assert torch.equal(vq.nearest_code(0.01 * vq.embedding.weight), torch.arange(64))


class LargestBuffer(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that any operation inside has made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_a_large_batch_is_searched_in_chunks_and_with_the_same_result():
    vq, f = quantizer(16384), torch.randn(64, 256, 8)  # in one piece: 64·256·16384 products, a gigabyte
    with LargestBuffer() as largest:
        codes = vq.nearest_code(f)
    assert 2**20 < largest.bytes <= 2**28
    for i in (0, 15, 16, 37, 63):
        products = unit(f[i]) @ unit(vq.embedding.weight).T
        found = products.gather(1, codes[i, :, None])[:, 0]
        assert (found > products.amax(1) - 1e-6).all()  # not the index itself: two codes may be equally near


def test_z_has_the_value_of_the_nearest_codes():
    vq, f = quantizer(), torch.randn(3, 10, 8)
    z, codes, _, _ = vq(f)
    assert torch.equal(codes, vq.nearest_code(f))
    torch.testing.assert_close(z, vq.codebook()[codes], rtol=0, atol=1e-6)


def test_straight_through_gradient_is_that_of_the_normalised_features():
    vq, f, weight = quantizer(), torch.randn(3, 10, 8, requires_grad=True), torch.randn(3, 10, 8)
    (through,) = torch.autograd.grad((vq(f)[0] * weight).sum(), f)
    (expected,) = torch.autograd.grad((F.normalize(f, dim=-1) * weight).sum(), f)
    torch.testing.assert_close(through, expected)
    assert expected.abs().max() > 0.01


def test_the_codebook_learns_nothing_through_z():
    vq, f = quantizer(), torch.randn(3, 10, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(vq(f)[0].pow(3).sum(), vq.embedding.weight, allow_unused=True)
    assert gradient is None or not gradient.any()


def reference_loss(vq, f, keep):
    """Both losses by hand: mean over D of the squared distance on the sphere, over the kept tokens of the batch."""
    f, book, total, count = unit(f), unit(vq.embedding.weight), 0.0, 0
    for b in range(f.shape[0]):
        for n in range(f.shape[1]):
            if keep[b, n]:
                total += min(((f[b, n] - row) ** 2).mean().item() for row in book)
                count += 1
    return total / count


def test_losses_are_mean_squared_distances_of_unit_vectors():
    vq, f = quantizer(), torch.randn(2, 6, 8) * 3
    expected = reference_loss(vq, f, torch.ones(2, 6))
    for keep in (None, torch.ones(2, 6, dtype=torch.bool)):
        _, _, vq_loss, commit = vq(f, keep)
        assert vq_loss.item() == pytest.approx(expected, rel=1e-5)
        assert commit.item() == pytest.approx(expected, rel=1e-5)  # same value, another gradient


def test_losses_are_means_over_the_kept_tokens_of_the_whole_batch():
    vq, f = quantizer(), torch.randn(2, 6, 8)
    keep = torch.arange(6) < torch.tensor([[1], [5]])  # uneven: no mean of the samples' means
    expected = reference_loss(vq, f, keep)
    assert vq(f, keep)[2].item() == pytest.approx(expected, rel=1e-5)
    assert vq(f, keep)[3].item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(reference_loss(vq, f, torch.ones(2, 6)), rel=1e-2)


def test_tokens_that_are_not_kept_get_no_gradient_from_the_losses():
    vq, f = quantizer(), torch.randn(2, 6, 8, requires_grad=True)
    keep = torch.arange(6) < torch.tensor([[1], [5]])
    vq(f, keep)[3].backward()
    assert f.grad[keep].abs().amax(-1).gt(0).all() and not f.grad[~keep].any()


def test_vq_loss_moves_only_the_codes_and_commitment_only_the_features():
    vq, f = quantizer(), torch.randn(2, 6, 8, requires_grad=True)
    _, codes, vq_loss, commit = vq(f)
    on_codes, on_features = torch.autograd.grad(vq_loss, (vq.embedding.weight, f), allow_unused=True)
    assert on_codes.any(-1).nonzero()[:, 0].tolist() == sorted(set(codes.flatten().tolist()))
    assert on_features is None or not on_features.any()
    on_codes, on_features = torch.autograd.grad(commit, (vq.embedding.weight, f), allow_unused=True)
    assert on_features.any(-1).all()
    assert on_codes is None or not on_codes.any()


def test_a_step_against_either_gradient_lowers_the_loss():
    vq, f = quantizer(), torch.randn(2, 6, 8, requires_grad=True)
    _, _, vq_loss, commit = vq(f)
    (vq_loss + commit).backward()
    with torch.no_grad():
        before = vq(f)[2]
        assert vq(f - 0.1 * f.grad)[2] < before
        vq.embedding.weight -= 0.1 * vq.embedding.weight.grad
        assert vq(f)[2] < before


def test_everything_stays_float32_under_bfloat16_autocast():
    vq, f = quantizer(1024), torch.randn(4, 200, 8)
    z, codes, vq_loss, commit = vq(f)
    with torch.autocast("cpu", torch.bfloat16):
        low_z, low_codes, low_vq, low_commit = vq(f)
        assert torch.equal(vq.nearest_code(f), codes)
        assert torch.equal(vq(f.bfloat16())[0], vq(f.bfloat16().float())[0])
    assert torch.equal(low_codes, codes)  # bfloat16 products would confuse near codes
    for low, full in ((low_z, z), (low_vq, vq_loss), (low_commit, commit)):
        assert low.dtype == torch.float32 and torch.equal(low, full)


def test_the_search_leaves_no_autograd_graph():
    vq, f = quantizer(), torch.randn(2, 6, 8, requires_grad=True)
    assert not vq.nearest_code(f).requires_grad and not vq(f)[1].requires_grad
