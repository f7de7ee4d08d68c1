"""Chapter 3, attention and blocks: rotary embeddings, attention against an explicit softmax, the gated block."""

import copy
import math

import pytest
import torch
from torch import nn

import dar

CPU = torch.device("cpu")
WIDTH = 128  # two heads


def attention(random_weights) -> dar.Attention:
    return random_weights(dar.Attention(WIDTH))


def turned(pair: complex, angle: float) -> complex:
    return pair * complex(math.cos(angle), math.sin(angle))


def scores(q, k, rope):
    """Inner products of one query and one key vector, [64] each, standing at all pairs of places: [n, n]."""
    n = len(rope)
    return dar.rotate(q.expand(n, -1), rope) @ dar.rotate(k.expand(n, -1), rope).T


# Rotary embeddings


def test_rope_1d_turns_adjacent_pairs_by_the_place():
    x, rope = torch.randn(7, 64), dar.rope_1d(torch.arange(7))
    y = dar.rotate(x, rope)
    for n in range(7):
        for i in range(32):
            pair = turned(complex(x[n, 2 * i], x[n, 2 * i + 1]), n * 10000 ** (-2 * i / 64))
            assert [y[n, 2 * i].item(), y[n, 2 * i + 1].item()] == pytest.approx([pair.real, pair.imag], abs=1e-5)


def test_rope_2d_turns_the_first_half_by_the_row_and_the_second_by_the_column():
    height, width = 3, 5
    x, rope = torch.randn(height * width, 64), dar.rope_2d(height, width, 0, CPU)
    y = dar.rotate(x, rope)
    for n in range(height * width):
        row, column = divmod(n, width)  # row-major
        for i in range(32):
            place, j = (row, i) if i < 16 else (column, i - 16)
            pair = turned(complex(x[n, 2 * i], x[n, 2 * i + 1]), place * 10000 ** (-2 * j / 32))
            assert [y[n, 2 * i].item(), y[n, 2 * i + 1].item()] == pytest.approx([pair.real, pair.imag], abs=1e-5)


def test_rope_1d_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 64)
    s = scores(q, k, dar.rope_1d(torch.arange(40)))
    for distance in range(-39, 40):
        diagonal = s.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert s[0].std() > 0.1  # and they do depend on it


def test_rope_2d_scores_depend_on_the_offset_alone():
    q, k = torch.randn(2, 64)
    s = scores(q, k, dar.rope_2d(4, 5, 0, CPU)).view(4, 5, 4, 5)
    torch.testing.assert_close(s[:3, :, :3], s[1:, :, 1:], rtol=0, atol=1e-4)  # all one row down
    torch.testing.assert_close(s[:, :4, :, :4], s[:, 1:, :, 1:], rtol=0, atol=1e-4)  # all one column right
    assert s[0, 0].std() > 0.1 and abs(s[0, 0, 0, 1] - s[0, 0, 1, 0]) > 0.01


def test_tokens_without_a_place_are_not_turned():
    x, rope = torch.randn(2, 4 + 3, 64), dar.rope_2d(2, 2, 3, CPU)
    y = dar.rotate(x, rope)
    assert rope.shape == (7, 32, 2)
    assert torch.equal(y[:, 4:], x[:, 4:])
    assert not torch.isclose(y[:, 1:4], x[:, 1:4]).all(-1).any()


def test_rotation_happens_in_float32():
    x, rope = torch.randn(2, 500, 64), dar.rope_1d(torch.arange(500))
    low = dar.rotate(x.bfloat16(), rope)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, dar.rotate(x.bfloat16().float(), rope).bfloat16())


def test_the_rotation_that_torch_compile_gets_is_the_same():
    x, rope = torch.randn(2, 9, 64), dar.rope_1d(torch.arange(9))
    torch.testing.assert_close(dar._rotate_in_real_numbers(x, rope), dar.rotate(x, rope))
    assert dar._rotate_in_real_numbers(x.bfloat16(), rope).dtype == torch.bfloat16


# Attention


def reference(layer, x, context=None, rope=None, allowed=None):
    """Attention of Vaswani et al., head by head, with LayerNorm on queries and keys before the rotation."""
    source, heads = x if context is None else context, []
    for h in range(WIDTH // 64):
        dims = slice(64 * h, 64 * h + 64)
        q, k, v = (
            (s @ m.weight.T + m.bias)[..., dims] for s, m in ((x, layer.q), (source, layer.k), (source, layer.v))
        )
        q, k = (
            (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * n.weight + n.bias
            for y, n in ((q, layer.q_norm), (k, layer.k_norm))
        )
        if rope is not None:
            q, k = dar.rotate(q, rope), (dar.rotate(k, rope) if context is None else k)
        score = q @ k.transpose(-1, -2) / math.sqrt(64)
        if allowed is not None:
            score = score.masked_fill(~allowed, -math.inf)
        heads.append(score.exp() / score.exp().sum(-1, keepdim=True) @ v)
    return torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("turn", [False, True])
def test_self_attention_is_the_explicit_softmax(random_weights, turn):
    layer, x = attention(random_weights), torch.randn(2, 6, WIDTH)
    rope = dar.rope_2d(2, 3, 0, CPU) if turn else None
    torch.testing.assert_close(layer(x, rope=rope), reference(layer, x, rope=rope), rtol=1e-4, atol=1e-5)


def test_attention_to_a_context_turns_the_queries_alone(random_weights):
    layer, x, context = attention(random_weights), torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)
    rope = dar.rope_2d(2, 3, 0, CPU)
    out = layer(x, context=context, rope=rope)
    torch.testing.assert_close(out, reference(layer, x, context, rope), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, layer(x, context=context), atol=1e-3)
    shuffled = layer(x, context=context[:, [2, 0, 3, 1]], rope=rope)  # keys have no place
    torch.testing.assert_close(shuffled, out, rtol=1e-4, atol=1e-5)


def test_causal_self_attention_is_the_explicit_softmax(random_weights):
    layer, x = attention(random_weights), torch.randn(2, 6, WIDTH)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, mask=allowed), reference(layer, x, allowed=allowed), rtol=1e-4, atol=1e-5)


def test_a_mask_is_true_where_a_row_may_attend(random_weights):
    layer, x = attention(random_weights), torch.randn(2, 4, WIDTH)
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    out = layer(x, mask=mask)
    torch.testing.assert_close(out, reference(layer, x, allowed=mask), rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[:, 1] = torch.randn(2, WIDTH)
    same = torch.isclose(layer(changed, mask=mask), out, atol=1e-5).flatten(2).all(-1).all(0)
    assert same.tolist() == [True, False, True, False]  # rows 1 and 3 see token 1


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_causal_mask_hides_what_is_later_than_each_place(n):
    place = torch.arange(8 - n, 8)
    expected = torch.ones(8, 8, dtype=torch.bool).tril()[8 - n :]
    assert torch.equal(dar.causal_mask(place, 8), expected)
    assert torch.equal(dar.causal_mask(place[:1], 11), torch.arange(11)[None] <= 8 - n)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("masked, n", [(False, 8), (True, 8), (True, 1), (False, 1), (False, 300), (True, 300)])
def test_bfloat16_on_a_cpu_attends_as_float32_does(masked, n, amx, monkeypatch):
    """It may be written out there; 300 queries make three parts."""
    monkeypatch.setattr(dar, "HAS_AMX", amx)
    q, k, v = torch.randn(3, 2, 2, max(n, 8), 64).bfloat16()
    q, m = q[:, :, :n], k.shape[2]
    mask = (torch.rand(n, m) < 0.5).logical_or(torch.eye(n, m, dtype=torch.bool)) if masked else None
    expected = dar.attend(q.float(), k.float(), v.float(), mask)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = dar.attend(q, k, v, mask)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.02)


def test_packed_linears_multiply_as_linears_do(random_weights):
    net = random_weights(
        torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Sequential(torch.nn.Linear(96, 8, bias=False)))
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        plain, packed = copy.deepcopy(net).to(dtype), copy.deepcopy(net).to(dtype)
        for _ in range(2):  # packing twice changes nothing more
            dar.pack_linears(packed)
        # bfloat16 stays as it is where the processor has none: oneDNN refuses it there
        known = dtype == torch.float32 or dar.has_fast_bfloat16(CPU)
        assert packed[1][0].weight.is_mkldnn == known and packed[0].weight.dtype == dtype
        for rows in (1, 4, 300):
            x = torch.randn(2, rows, 64, dtype=dtype)
            torch.testing.assert_close(packed(x), plain(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_attention_runs_under_bfloat16_autocast(random_weights):
    layer, x = attention(random_weights), torch.randn(2, 6, WIDTH)
    rope, mask = dar.rope_2d(2, 3, 0, CPU), dar.causal_mask(torch.arange(6), 6)
    with torch.autocast("cpu", torch.bfloat16):
        turned_low, causal_low = layer(x, rope=rope), layer(x, mask=mask)
    for low, full in ((turned_low, layer(x, rope=rope)), (causal_low, layer(x, mask=mask))):
        torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)


# Blocks


def test_the_mlp_is_linear_silu_linear_with_four_times_the_width(random_weights):
    mlp, x = random_weights(dar.MLP(WIDTH)), torch.randn(2, 3, WIDTH)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    assert hidden.shape[-1] == 4 * WIDTH
    expected = (hidden * torch.sigmoid(hidden)) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_gated_block_is_the_identity():
    block, x = dar.GatedBlock(WIDTH), torch.randn(2, 5, WIDTH)
    assert torch.equal(block(x), x)


def test_a_gated_block_adds_attention_then_mlp_each_normed_before_and_gated_after(random_weights):
    block, x = random_weights(dar.GatedBlock(WIDTH)), torch.randn(2, 6, WIDTH)
    rope, mask = dar.rope_2d(2, 3, 0, CPU), torch.ones(6, 6, dtype=torch.bool).triu()
    for setting in ({"rope": rope}, {"mask": mask}):
        y = x + block.gate1 * block.attention(block.norm1(x), **setting)
        torch.testing.assert_close(block(x, **setting), y + block.gate2 * block.mlp(block.norm2(y)))


def test_a_gated_block_has_the_norms_and_gates_of_the_released_weights():
    block = dar.GatedBlock(WIDTH)
    for norm in (block.norm1, block.norm2, block.attention.q_norm, block.attention.k_norm):
        assert norm.eps == 1e-6 and norm.weight is not None and norm.bias is not None
    assert block.attention.q_norm.weight.shape == (64,)  # each head by itself
    assert block.gate1.shape == block.gate2.shape == (WIDTH,)


def test_normalize_is_layer_norm_without_parameters():
    x = torch.randn(3, 40) * 5 + 2
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(dar.layer_norm(x), expected)
    torch.testing.assert_close(
        dar.layer_norm(1e-3 * x).std(-1), dar.layer_norm(x).std(-1), rtol=0.1, atol=0
    )  # eps 1e-6


def test_linears_start_small_and_without_bias():
    module = nn.Sequential(nn.Conv2d(3, 64, 8), nn.Linear(300, 300), nn.Linear(8, 64, bias=False))
    dar.init_linears(module, 0.02)
    for m in module:
        assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert m.bias is None or not m.bias.any()


def test_a_mask_counts_for_a_single_query_too():
    q, k, v = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    mask = torch.tensor([[True, False, True, True, False]])
    with torch.no_grad():
        expected = dar.attend(q, k[:, :, mask[0]], v[:, :, mask[0]])
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
            found = dar.attend(q.to(dtype), k.to(dtype), v.to(dtype), mask).float()
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
