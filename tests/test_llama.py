"""Chapter 6: the Llama (section 3.2, eq. 6)."""

import math
from types import SimpleNamespace

import pytest
import synthetic
import torch
import torch.nn.functional as F

import dar


@pytest.fixture(scope="module")
def golden_model(golden_ar) -> dar.ARTransformer:
    """The network of the golden file, its weights put in by hand: this file trusts no loader."""
    args, weights = golden_ar["args"], synthetic.synthetic_state_dict(golden_ar)
    config = dar.ARConfig(args["dim"], args["n_layer"], args["vocab_size"], args["num_classes"], args["block_size"])
    weights["cls_embedding.weight"] = weights.pop("cls_embedding.embedding_table.weight")
    model = dar.ARTransformer(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    return torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(5))


LABELS = torch.tensor([3, 7])


@pytest.mark.parametrize("which", ["logits", "logits_uncond"])
@torch.no_grad()
def test_logits_agree_with_the_authors_implementation(golden_model, golden_ar, which):
    labels = torch.from_numpy(golden_ar["labels"])
    if which == "logits_uncond":
        labels = torch.full_like(labels, 10)  # one past the last class
    logits = golden_model(torch.from_numpy(golden_ar["idx"]), labels)
    torch.testing.assert_close(logits, torch.from_numpy(golden_ar[which]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, count", [("B", 110_888_448), ("L", 342_910_976), ("XL", 774_699_520)])
def test_presets_have_the_papers_parameter_counts(name, count):
    with torch.device("meta"):
        model = dar.ARTransformer(dar.AR_PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("fields", [{"width": 100}, {"vocab_size": 0}, {"num_tokens": -1}, {"num_classes": 2.5}])
def test_a_config_that_cannot_be_built_is_refused_by_name(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        dar.ARConfig(**fields)


def test_rmsnorm_divides_by_the_root_mean_square():
    norm = dar.RMSNorm(4)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0], [1e-3, 1e-3, 1e-3, 1e-3]])  # where x² is small, eps = 1e-5 shows
    rms = torch.tensor([[math.sqrt(30 / 4 + 1e-5)], [math.sqrt(1e-6 + 1e-5)]])
    torch.testing.assert_close(norm(x), x / rms * norm.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_computes_in_float32(dtype):
    x = (1000 * torch.randn(8, 256)).to(dtype)  # the squares overflow float16 and lose digits in bfloat16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = dar.RMSNorm(256).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0)
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.float().to(dtype) * norm.weight, rtol=0, atol=0)


@pytest.mark.parametrize("width, hidden", [(64, 256), (128, 512), (384, 1024), (768, 2048), (1024, 2816), (1280, 3584)])
def test_swiglu_hidden_width_is_rounded_as_llamas(width, hidden):
    with torch.device("meta"):
        mlp = dar.SwiGLU(width)
    assert mlp.w1.weight.shape == mlp.w3.weight.shape == (hidden, width) and mlp.w2.weight.shape == (width, hidden)


def test_swiglu_gates_w3_with_silu_of_w1(random_weights):
    mlp, x = random_weights(dar.SwiGLU(64)), torch.randn(3, 64)
    gate, value = x @ mlp.w1.weight.T, x @ mlp.w3.weight.T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * value) @ mlp.w2.weight.T)


def test_attention_equals_its_formula_with_complex_rotations(random_weights):
    attention, x = random_weights(dar.LlamaAttention(128)), torch.randn(2, 9, 128)
    q, k, v = (x @ attention.wqkv.weight.T).split(128, -1)  # rows of wqkv: queries, keys, values
    q, k, v = (y.unflatten(-1, (2, 64)).transpose(1, 2) for y in (q, k, v))  # [B, heads, n, 64]
    angle = torch.arange(9)[:, None] * 10000 ** (-torch.arange(32) / 32)
    turn = torch.polar(torch.ones_like(angle), angle)  # adjacent pairs as complex numbers
    q, k = (torch.view_as_complex(y.unflatten(-1, (32, 2)).contiguous()) * turn for y in (q, k))
    scores = (q @ k.conj().transpose(-1, -2)).real / 8 + torch.full((9, 9), -math.inf).triu(1)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ attention.wo.weight.T
    place = torch.arange(9)
    out = attention(x, dar.rope_1d(place), dar.causal_mask(place, 9))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_class_stands_at_position_0_and_token_i_at_i_plus_1(small_ar, codes):
    seen = []
    hook = small_ar.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        small_ar(codes, LABELS)
    hook.remove()
    angle = torch.arange(33)[:, None] * 10000 ** (-torch.arange(32) / 32)
    torch.testing.assert_close(seen[0], torch.stack((angle.cos(), angle.sin()), -1))


@torch.no_grad()
def test_no_logit_knows_a_token_that_it_may_not_know(small_ar, codes):
    before = small_ar(codes, LABELS)
    for i in range(32):
        changed = codes.clone()
        changed[:, i] = (changed[:, i] + 1) % 64
        difference = (small_ar(changed, LABELS) - before).abs().amax(-1)  # [B, 33]
        assert torch.equal(difference[:, : i + 1], torch.zeros(2, i + 1)), f"token {i} is known too early"
        assert (difference[:, i + 1 :] > 0).all(), f"token {i} is not known where it should be"


@torch.no_grad()
def test_every_logit_knows_the_class(small_ar, codes):
    difference = small_ar(codes, LABELS) - small_ar(codes, torch.tensor([4, 10]))
    assert (difference.abs().amax(-1) > 0).all()


def test_a_fresh_model_predicts_every_token_alike(codes):
    model = dar.ARTransformer(dar.ARConfig(128, 2, vocab_size=64, num_classes=10, num_tokens=32))
    logits = model(codes, LABELS)
    assert torch.equal(logits, torch.zeros(2, 33, 64))
    assert F.cross_entropy(logits[:, :-1].flatten(0, 1), codes.flatten()).item() == pytest.approx(math.log(64))


def test_other_weights_start_normal_with_std_0_02():
    model = dar.ARTransformer(dar.ARConfig(256, 1, vocab_size=512, num_classes=100))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name != "output.weight":
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name
            assert weight.abs().max() > 0.06, f"{name} is cut off, so not normal"


@torch.no_grad()
def test_dropout_acts_in_training_alone(make_ar, codes):
    plain, model = make_ar(dropout=0.0), make_ar(dropout=0.1)
    assert torch.equal(model(codes, LABELS), plain(codes, LABELS))
    model.train(), plain.train()
    assert not torch.equal(model(codes, LABELS), model(codes, LABELS))
    assert torch.equal(plain(codes, LABELS), plain(codes, LABELS))


@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
@torch.no_grad()
def test_dropout_acts_on_the_outputs_of_attention_and_mlp(random_weights, branch):
    block, x, place = random_weights(dar.LlamaBlock(128, 0.25)).train(), torch.randn(4, 32, 128), torch.arange(32)
    where = dar.rope_1d(place), dar.causal_mask(place, 32)
    other = block.feed_forward.w2 if branch == "attention" else block.attention.wo
    other.weight.zero_()
    added = block(x, *where) - x
    assert (added == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = added != 0
    torch.testing.assert_close(added[kept], (block.eval()(x, *where) - x)[kept] / 0.75, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dropout_acts_on_the_embeddings(make_ar):
    model, x = make_ar(dropout=1.0, layers=0).train(), torch.randn(2, 5, 128)
    assert torch.equal(model.run(x, torch.arange(5), 5), torch.zeros_like(x))
    assert not torch.equal(model.eval().run(x, torch.arange(5), 5), torch.zeros_like(x))


@pytest.mark.parametrize("cuts", [[1] * 33, [33], [12, 1, 1, 19], [1, 31, 1], [5, 4, 24]])
@pytest.mark.parametrize("ahead", [0, 7])
@torch.no_grad()
def test_running_with_a_kv_cache_equals_the_forward_pass(small_ar, codes, cuts, ahead):
    """Also where places are read that nothing was written to yet."""
    x, end, logits = small_ar.embed(codes, LABELS), 0, []
    caches = small_ar.new_caches(2, 40)
    for part in x.split(cuts, 1):
        place = torch.arange(end, end + part.shape[1])
        end += part.shape[1]
        logits.append(small_ar.next_logits(part, place, end + ahead, caches))
    expected = small_ar(codes, LABELS)[:, torch.tensor(cuts).cumsum(0) - 1]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_keeps_what_is_put_and_returns_the_first_places():
    cache, k, v = dar.KVCache(*torch.zeros(2, 2, 3, 8, 64)), *torch.randn(2, 2, 3, 5, 64)
    memory = cache.k.data_ptr(), cache.v.data_ptr()
    for place in (torch.arange(2), torch.tensor([2]), torch.arange(3, 5)):
        keys, values = cache.put(k[:, :, place], v[:, :, place], place, 6)
        end = int(place[-1]) + 1
        assert torch.equal(keys[:, :, :end], k[:, :, :end]) and torch.equal(values[:, :, :end], v[:, :, :end])
        assert keys.shape[2] == 6 and not keys[:, :, end:].any() and not values[:, :, end:].any()
        assert (keys.data_ptr(), values.data_ptr()) == memory


# The loss, eq. 6


def test_the_loss_is_the_mean_of_minus_log_p_of_each_token(small_ar, codes):
    with torch.no_grad():
        probability = small_ar(codes, LABELS).softmax(-1)
    by_hand = [-math.log(probability[b, i, codes[b, i]]) for b in range(2) for i in range(32)]
    assert dar.ar_loss(small_ar, codes, LABELS).item() == pytest.approx(sum(by_hand) / 64, rel=1e-5)


def test_a_dropped_class_is_read_as_no_class(small_ar, codes):
    loss = dar.ar_loss(small_ar, codes, LABELS, torch.tensor([False, True]), 10)
    assert torch.equal(loss, dar.ar_loss(small_ar, codes, torch.tensor([3, 10])))
    assert not torch.equal(loss, dar.ar_loss(small_ar, codes, LABELS))


def test_logits_are_float32_whatever_the_weights(make_ar, codes):
    logits = make_ar().to(torch.bfloat16)(codes[:, :4], LABELS)
    assert logits.dtype == torch.float32 and logits.shape == (2, 5, 64)
    assert make_ar()(codes[:, :0], LABELS).shape == (2, 1, 64)  # nothing but the class


@pytest.mark.parametrize("its, named", [((65, 32), "64 codes.* 65 and 32"), ((64, 40), "32 tokens.* 64 and 40")])
def test_a_tokenizer_that_does_not_fit_is_refused_with_both_numbers(make_ar, its, named):
    tokenizer = SimpleNamespace(config=SimpleNamespace(codebook_size=its[0], num_tokens=its[1]))
    model = make_ar()
    with pytest.raises(ValueError, match=named):
        model.attach_tokenizer(tokenizer)
    assert model.tokenizer is None


def test_an_attached_tokenizer_is_no_part_of_the_model(make_ar, small_tokenizer):
    model = make_ar()
    names = list(model.state_dict())
    model.attach_tokenizer(small_tokenizer)
    assert model.tokenizer is small_tokenizer
    assert list(model.state_dict()) == names
    model.attach_tokenizer(None)
    assert model.tokenizer is None
