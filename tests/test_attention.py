"""Chapter 3, attention and blocks: rotary positions, masks, the two plain blocks."""

import math

import pytest
import torch

import dar

CPU = torch.device("cpu")
WIDTH = 128  # two heads
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.fixture
def attention(random_weights) -> dar.Attention:
    return random_weights(dar.Attention(WIDTH))


@pytest.fixture
def x() -> torch.Tensor:
    """Two images of 2x3 patches."""
    return torch.randn(2, 6, WIDTH)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Rotary positions


def as_complex(x):
    """Pairs of neighbours [n, 64] -> complex numbers [n, 32], which a rotation multiplies."""
    return torch.view_as_complex(x.unflatten(-1, (32, 2)))


def unit_circle(angles):
    return torch.polar(torch.ones_like(angles), angles)


def test_rope_1d_turns_pair_i_by_its_angle():
    x = torch.randn(7, 64)
    position = torch.arange(7)
    turned = dar.rotate(x, dar.rope_1d(position))
    angles = torch.outer(position, 10000 ** (-torch.arange(32) / 32))
    assert_close(as_complex(turned), as_complex(x) * unit_circle(angles))


def test_rope_2d_turns_half_by_the_row_half_by_the_column():
    x = torch.randn(3 * 5, 64)
    turned = dar.rotate(x, dar.rope_2d(3, 5, 0, CPU))
    patch = torch.arange(3 * 5)
    frequency = 10000 ** (-torch.arange(16) / 16)
    angles = torch.cat((torch.outer(patch // 5, frequency), torch.outer(patch % 5, frequency)), -1)
    assert_close(as_complex(turned), as_complex(x) * unit_circle(angles))


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 64)
    rope = dar.rope_1d(torch.arange(40))
    products = dar.rotate(q.expand(40, 64), rope) @ dar.rotate(k.expand(40, 64), rope).T
    for distance in range(-39, 40):
        same_distance = products.diagonal(distance)
        assert same_distance.max() - same_distance.min() < 1e-4
    assert products[0].std() > 0.1  # and they do depend on it


def test_queries_are_not_turned():
    x = torch.randn(2, 4 + 3, 64)
    turned = dar.rotate(x, dar.rope_2d(2, 2, 3, CPU))
    assert torch.equal(turned[:, 4:], x[:, 4:])
    assert torch.equal(turned[:, 0], x[:, 0])  # like the first patch
    assert (turned[:, 1:4] != x[:, 1:4]).any(-1).all()


# Attention


def attention_by_hand(layer, x, context=None, rope=None, mask=None):
    """Head by head, with LayerNorm on queries and keys before the rotation."""
    source = x if context is None else context
    heads = []
    for dims in (slice(0, 64), slice(64, 128)):
        q = layer.q_norm(layer.q(x)[..., dims])
        k = layer.k_norm(layer.k(source)[..., dims])
        v = layer.v(source)[..., dims]
        if rope is not None:
            q = dar.rotate(q, rope)
            if context is None:
                k = dar.rotate(k, rope)
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    return layer.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("rope", [None, dar.rope_2d(2, 3, 0, CPU)], ids=["plain", "turned"])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["open", "causal"])
def test_attention_to_itself(attention, x, rope, mask):
    expected = attention_by_hand(attention, x, rope=rope, mask=mask)
    assert_close(attention(x, rope=rope, mask=mask), expected)


def test_a_context_has_no_positions(attention, x):
    context = torch.randn(2, 4, WIDTH)
    rope = dar.rope_2d(2, 3, 0, CPU)
    out = attention(x, context=context, rope=rope)
    assert_close(out, attention_by_hand(attention, x, context, rope))
    shuffled = context[:, [2, 0, 3, 1]]
    assert_close(attention(x, context=shuffled, rope=rope), out)


def test_a_mask_is_true_where_a_query_may_attend(attention, x):
    mask = torch.eye(6, dtype=torch.bool)
    mask[[1, 3], 4] = True
    out = attention(x, mask=mask)
    x[:, 4] += 1
    changed = (attention(x, mask=mask) - out).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_causal_mask_ends_at_each_position(n):
    position = torch.arange(8 - n, 8)
    lower_triangle = torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(dar.causal_mask(position, 8), lower_triangle[position])


# Blocks


def test_a_fresh_gated_block_is_the_identity(x):
    assert torch.equal(dar.GatedBlock(WIDTH)(x), x)


@pytest.mark.parametrize("settings", [{"rope": dar.rope_2d(2, 3, 0, CPU)}, {"mask": CAUSAL}])
def test_a_gated_block_adds_attention_then_mlp(random_weights, x, settings):
    block = random_weights(dar.GatedBlock(WIDTH))
    y = x + block.gate1 * block.attention(block.norm1(x), **settings)
    assert_close(block(x, **settings), y + block.gate2 * block.mlp(block.norm2(y)))


def test_layer_norm_has_eps_1e_6():
    for size in (5, 1e-3):  # at 1e-3, eps is as large as the variance
        x = size * (torch.randn(3, 40) + 2)
        deviation = x - x.mean(-1, keepdim=True)
        variance = deviation.pow(2).mean(-1, keepdim=True)
        assert_close(dar.layer_norm(x), deviation / (variance + 1e-6).sqrt())
