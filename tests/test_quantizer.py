"""Chapter 2, the quantizer: features to tokens, and the two losses that bring them together."""

import pytest
import torch
import torch.nn.functional as F

import dar


@pytest.fixture
def quantizer() -> dar.VectorQuantizer:
    """64 rows of very different lengths, so that forgetting to normalise them shows."""
    quantizer = dar.VectorQuantizer(64, 8)
    with torch.no_grad():
        quantizer.embedding.weight.mul_(torch.rand(64, 1) * 5 + 0.1)
    return quantizer


@pytest.fixture
def f() -> torch.Tensor:
    """Features of two images, 6 tokens each."""
    return (3 * torch.randn(2, 6, 8)).requires_grad_()


ALL = torch.ones(2, 6, dtype=torch.bool)
SOME = torch.arange(6) < torch.tensor([[1], [5]])  # uneven: no mean of the images' means


def squared_distances(quantizer, f) -> torch.Tensor:
    """|f - z|^2 to all rows, both of length one: float64 [B, N, V]."""
    f = F.normalize(f.detach().double(), dim=-1)
    rows = F.normalize(quantizer.embedding.weight.detach().double(), dim=-1)
    return (f[:, :, None] - rows).pow(2).sum(-1)


# Search


def test_rows_have_length_one(quantizer):
    z = quantizer.lookup(torch.arange(64).view(2, 32))
    assert z.shape == (2, 32, 8)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 32))
    directions = F.normalize(quantizer.embedding.weight, dim=-1)
    torch.testing.assert_close(z.flatten(0, 1), directions)


def test_a_token_is_the_number_of_the_nearest_row(quantizer):
    f = torch.randn(4, 100, 8) * torch.rand(4, 100, 1)
    codes = quantizer.nearest_code(f)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, squared_distances(quantizer, f).argmin(-1))


def test_z_is_the_row_of_the_token(quantizer, f):
    z, codes, _, _ = quantizer(f, ALL)
    assert torch.equal(codes, quantizer.nearest_code(f))
    torch.testing.assert_close(z, quantizer.lookup(codes))


# Gradients


def test_z_passes_its_gradient_straight_through(quantizer, f):
    weight = torch.randn(2, 6, 8)
    z = quantizer(f, ALL)[0]
    (through,) = torch.autograd.grad((z * weight).sum(), f)
    (of_the_direction,) = torch.autograd.grad((F.normalize(f, dim=-1) * weight).sum(), f)
    torch.testing.assert_close(through, of_the_direction)


def test_the_codebook_learns_nothing_through_z(quantizer, f):
    z = quantizer(f, ALL)[0]
    z.pow(3).sum().backward()
    assert quantizer.embedding.weight.grad is None


def test_l_vq_moves_the_chosen_rows_alone(quantizer, f):
    _, codes, l_vq, _ = quantizer(f, ALL)
    l_vq.backward()
    moved = quantizer.embedding.weight.grad.any(-1).nonzero().flatten()
    assert torch.equal(moved, codes.unique())
    assert f.grad is None


def test_l_commit_moves_the_features_alone(quantizer, f):
    l_commit = quantizer(f, ALL)[3]
    l_commit.backward()
    assert f.grad.any(-1).all()
    assert quantizer.embedding.weight.grad is None


# Losses


@pytest.mark.parametrize("keep", [ALL, SOME], ids=["all", "some"])
def test_losses_are_means_over_the_kept_tokens(quantizer, f, keep):
    distance = squared_distances(quantizer, f).amin(-1) / 8  # the mean over D = 8 numbers
    expected = distance[keep].mean().item()
    _, _, l_vq, l_commit = quantizer(f, keep)
    assert l_vq.item() == pytest.approx(expected, rel=1e-5)
    assert l_commit.item() == pytest.approx(expected, rel=1e-5)  # same value, another gradient


# Precision, and the end of a warm-up


def test_autocast_changes_nothing(quantizer, f):
    """In bfloat16, near rows would be taken for each other."""
    outputs = quantizer(f, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = quantizer(f, ALL)
        assert torch.equal(quantizer.nearest_code(f), outputs[1])
    for low, full in zip(under_autocast, outputs):
        assert torch.equal(low, full)
        assert low.dtype == full.dtype


def test_a_codebook_may_start_from_features(quantizer):
    f = torch.randn(100, 8)
    quantizer.start_from(f)
    distance = torch.cdist(quantizer.embedding.weight, F.normalize(f, dim=-1))  # [V, n]
    nearest = distance.min(-1)
    assert nearest.values.max() < 1e-3  # each row is a feature's direction
    assert len(nearest.indices.unique()) == 64  # none is taken twice
    assert nearest.indices.tolist() != list(range(64))  # nor simply the first
