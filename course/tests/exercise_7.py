"""Exercise 7: the Llama's block."""

import math

import torch
from torch import Tensor

import dar
from course.tests.support import check_close, randomize

CODES = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([3, 7])


def turns(position: Tensor) -> Tensor:
    """The 32 turns of a head at these positions, as complex numbers [n, 32]."""
    angle = position[:, None] * 10000 ** (-torch.arange(32) / 32)
    return torch.polar(torch.ones_like(angle), angle)


def small_llama() -> dar.ARTransformer:
    config = dar.ARConfig(width=128, layers=2, vocab_size=64, num_classes=10, num_tokens=8)
    return randomize(dar.ARTransformer(config))


def test_rope_turns_by_position_and_pair():
    position = torch.arange(7)
    rope = dar.rope_1d(position)
    assert rope.dtype == torch.float32, f"rotations are {rope.dtype}"
    check_close("cos and sin at 7 positions", rope, torch.view_as_real(turns(position)))


def test_rope_is_for_any_positions():
    position = torch.tensor([5, 900, 2])
    check_close("5, 900, 2", dar.rope_1d(position), torch.view_as_real(turns(position)), 1e-3)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64)
    rope = dar.rope_1d(torch.arange(40))
    turned_q = dar.rotate(q.expand(1, 1, 40, 64), rope)[0, 0]
    turned_k = dar.rotate(k.expand(1, 1, 40, 64), rope)[0, 0]
    products = turned_q @ turned_k.T
    check_close("all one position later", products[1:, 1:], products[:-1, :-1], 1e-4)
    assert products[0].std() > 0.1, "they do not depend on the distance"


def test_rmsnorm_divides_by_the_root_mean_square():
    norm = dar.RMSNorm(4)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0], [1e-3, 1e-3, 1e-3, 1e-3]])  # small: 1e-5 shows
    rms = torch.tensor([[math.sqrt(7.5)], [math.sqrt(1.1e-5)]])
    check_close("two rows", norm(x), x / rms * norm.weight)


def test_rmsnorm_computes_in_float32():
    x = (1000 * torch.randn(8, 256)).half()  # its squares are too large for float16
    out = dar.RMSNorm(256).half()(x)
    assert out.dtype == torch.float16, f"float16 becomes {out.dtype}"
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    check_close("float16", out, exact, 1e-3)


def test_attention_is_its_formula():
    attention = randomize(dar.LlamaAttention(128))
    x = torch.randn(2, 9, 128)
    position = torch.arange(9)
    queries, keys, values = (x @ attention.wqkv.weight.T).split(128, -1)
    heads = []
    for h in range(2):
        part = slice(64 * h, 64 * h + 64)
        q = torch.view_as_complex(queries[..., part].unflatten(-1, (32, 2)).contiguous())
        k = torch.view_as_complex(keys[..., part].unflatten(-1, (32, 2)).contiguous())
        scores = ((q * turns(position)) @ (k * turns(position)).mH).real / 8
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ values[..., part])
    expected = torch.cat(heads, -1) @ attention.wo.weight.T
    out = attention(x, dar.rope_1d(position), dar.causal_mask(position, 9))
    check_close("two heads, nine tokens", out, expected)


def test_keys_and_values_go_through_the_cache():
    attention = randomize(dar.LlamaAttention(128))
    x = torch.randn(2, 9, 128)
    position = torch.arange(9)
    rope = dar.rope_1d(position)
    mask = dar.causal_mask(position, 9)
    whole = attention(x, rope, mask)
    cache = dar.KVCache(torch.zeros(2, 2, 9, 64), torch.zeros(2, 2, 9, 64))
    parts = []
    for where in (position[:5], position[5:6], position[6:]):
        out = attention(x[:, where], rope[where], mask[where], cache, where)
        parts.append(out)
    check_close("nine tokens in three parts", torch.cat(parts, 1), whole)
    check_close("the cache holds values as they are", cache.v, expected_values(attention, x))


def expected_values(attention, x: Tensor) -> Tensor:
    values = x @ attention.wqkv.weight[256:].T
    return values.unflatten(-1, (2, 64)).transpose(1, 2)


def test_swiglu_gates_w3_with_silu_of_w1():
    mlp = randomize(dar.SwiGLU(64))
    x = torch.randn(3, 64)
    gate = x @ mlp.w1.weight.T
    value = x @ mlp.w3.weight.T
    check_close("three rows", mlp(x), (gate * gate.sigmoid() * value) @ mlp.w2.weight.T)


@torch.no_grad()
def test_no_logit_knows_a_later_token():
    llama = small_llama()
    before = llama(CODES, LABELS)
    for i in range(8):
        changed = CODES.clone()
        changed[:, i] = (changed[:, i] + 1) % 64
        difference = (llama(changed, LABELS) - before).abs().amax(-1)  # [B, 9]
        assert not difference[:, : i + 1].any(), f"token {i + 1} is known too early"
        assert (difference[:, i + 1 :] > 0).all(), f"token {i + 1} is not known later"


@torch.no_grad()
def test_every_logit_knows_the_class():
    llama = small_llama()
    difference = llama(CODES, LABELS) - llama(CODES, torch.tensor([4, 10]))
    assert difference.any(-1).all(), "a logit does not know the class"
