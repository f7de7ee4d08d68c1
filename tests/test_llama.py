"""Chapter 6, the Llama: the authors' numbers, who may know what, and how it is trained."""

import math

import pytest
import torch

import dar

LABELS = torch.tensor([3, 7])


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(64, (2, 32))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The authors' numbers, and sizes


@torch.no_grad()
def test_logits_of_the_authors(authors_ar, golden_ar):
    codes = torch.from_numpy(golden_ar["idx"])
    labels = torch.from_numpy(golden_ar["labels"])
    no_class = torch.full_like(labels, 10)
    for asked, golden in ((labels, "logits"), (no_class, "logits_uncond")):
        logits = authors_ar(codes, asked)
        torch.testing.assert_close(
            logits, torch.from_numpy(golden_ar[golden]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "name, count", [("B", 110_888_448), ("L", 342_910_976), ("XL", 774_699_520)]
)
def test_parameters_of_the_paper(name, count):
    with torch.device("meta"):
        model = dar.ARTransformer(dar.AR_PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", ["tiny", "shapes", "cifar10"])
def test_our_presets_write_the_tokens_of_their_namesakes(name):
    with torch.device("meta"):
        ar = dar.ARTransformer(dar.AR_PRESETS[name])
        tokenizer = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS[name])
    ar.attach_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 100}, "width = 100: .*64"),
        ({"width": 256.0}, "width = 256.0: expected .*int"),
        ({"layers": "4"}, "layers = '4': expected .*int"),
        ({"layers": -1}, "layers=-1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"dropout": 1.5}, "dropout = 1.5"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dar.ARConfig(**fields)


# Layers


def test_rmsnorm_by_hand():
    norm = dar.RMSNorm(4)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0], [1e-3, 1e-3, 1e-3, 1e-3]])
    mean_square = torch.tensor([[7.5], [1e-6]])  # in the second row, eps = 1e-5 shows
    assert_close(norm(x), x / (mean_square + 1e-5).sqrt() * norm.weight)


@pytest.mark.parametrize("width, hidden", [(64, 256), (384, 1024), (1024, 2816), (1280, 3584)])
def test_swiglu_is_8_thirds_wide_rounded_up_to_256(width, hidden):
    with torch.device("meta"):
        mlp = dar.SwiGLU(width)
    assert mlp.w1.weight.shape == mlp.w3.weight.shape == (hidden, width)
    assert mlp.w2.weight.shape == (width, hidden)


def test_attention_by_hand(random_weights):
    attention = random_weights(dar.LlamaAttention(128))
    x = torch.randn(2, 9, 128)
    position = torch.arange(9)
    rope = dar.rope_1d(position)
    q, k, v = (x @ attention.wqkv.weight.T).split(128, -1)  # rows of wqkv: queries, keys, values
    heads = []
    for dims in (slice(0, 64), slice(64, 128)):
        turned_q = dar.rotate(q[..., dims], rope)
        turned_k = dar.rotate(k[..., dims], rope)
        scores = turned_q @ turned_k.transpose(-1, -2) / 8
        scores = scores + torch.full((9, 9), -math.inf).triu(1)
        heads.append(scores.softmax(-1) @ v[..., dims])
    expected = torch.cat(heads, -1) @ attention.wo.weight.T
    assert_close(attention(x, rope, dar.causal_mask(position, 9)), expected)


# Who may know what


@torch.no_grad()
def test_logits_know_the_tokens_before_and_no_other(small_ar, codes):
    """The logits at position i are of z_{i+1}: they know z_1 ... z_i."""
    before = small_ar(codes, LABELS)  # [B, 33, V]
    for i in range(32):
        changed = codes.clone()
        changed[:, i] = (codes[:, i] + 1) % 64
        difference = (small_ar(changed, LABELS) - before).abs().amax((0, 2))
        assert not difference[: i + 1].any()
        assert (difference[i + 1 :] > 0).all()


@torch.no_grad()
def test_all_logits_know_the_class(small_ar, codes):
    difference = small_ar(codes, LABELS) - small_ar(codes, LABELS + 1)
    assert (difference.abs().amax((0, 2)) > 0).all()


# Fresh weights and dropout


def test_all_tokens_start_equally_likely(codes):
    model = dar.ARTransformer(dar.ARConfig(128, 2, vocab_size=64))
    assert not model(codes, LABELS).any()
    assert dar.ar_loss(model, codes, LABELS).item() == pytest.approx(math.log(64))


def test_other_weights_start_with_std_0_02():
    model = dar.ARTransformer(dar.ARConfig(256, 1, vocab_size=512, num_classes=100))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name != "output.weight":
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name


@torch.no_grad()
@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_dropout_acts_on_what_a_branch_adds(random_weights, branch):
    block = random_weights(dar.LlamaBlock(128, dropout=0.25))
    other = {"attention": block.feed_forward.w2, "feed_forward": block.attention.wo}[branch]
    other.weight.zero_()
    x = torch.randn(4, 32, 128)
    position = torch.arange(32)
    where = dar.rope_1d(position), dar.causal_mask(position, 32)
    whole = block(x, *where) - x
    thinned = block.train()(x, *where) - x
    stays = thinned != 0
    assert stays.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(thinned[stays], whole[stays] / 0.75, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dropout_acts_on_the_embeddings(make_ar, codes):
    model = make_ar(dropout=1.0)  # nothing is left of the embeddings, and nothing is added
    assert model(codes, LABELS).any()
    assert not model.train()(codes, LABELS).any()


# The loss, and the training step


@torch.no_grad()
def test_eq6_by_hand(small_ar, codes):
    probability = small_ar(codes, LABELS).softmax(-1)
    of_image = []
    for b in range(2):
        of_tokens = [probability[b, i, codes[b, i]].item() for i in range(32)]
        of_image.append(math.prod(of_tokens))
    nats_a_token = [-math.log(p) / 32 for p in of_image]
    expected = sum(nats_a_token) / 2
    assert dar.ar_loss(small_ar, codes, LABELS).item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def model(make_ar, small_tokenizer):
    model = make_ar(dropout=0.0).train()
    model.attach_tokenizer(small_tokenizer)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32) * 2 - 1


def test_a_training_step_learns_the_images_tokens(model, images):
    codes = model.tokenizer.encode(images)
    before = dar.ar_loss(model, codes, LABELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = dar.ar_training_step(model, optimizer, images, LABELS, class_dropout=0)
    torch.testing.assert_close(first, before)
    for _ in range(10):
        dar.ar_training_step(model, optimizer, images, LABELS)
    assert dar.ar_loss(model, codes, LABELS) < 0.5 * before


@pytest.mark.parametrize("class_dropout, learned", [(0.0, [3, 7]), (1.0, [10])])
def test_dropped_classes_teach_no_class(model, images, class_dropout, learned):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.cls_embedding.weight.clone()
    dar.ar_training_step(model, optimizer, images, LABELS, class_dropout)
    moved = (model.cls_embedding.weight != before).any(-1)
    assert moved.nonzero().flatten().tolist() == learned


def test_a_tenth_of_the_classes_is_dropped(make_ar, small_tokenizer, monkeypatch):
    model = make_ar(layers=1, width=64)
    model.attach_tokenizer(small_tokenizer)
    monkeypatch.setattr(small_tokenizer, "encode", lambda images: torch.zeros(2000, 1).long())
    seen = []
    model.cls_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    optimizer = torch.optim.SGD(model.parameters())
    dar.ar_training_step(model, optimizer, None, torch.zeros(2000).long())
    dropped = seen[0] == 10
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_a_step_is_no_longer_than_its_rate(model, images):
    """The gradient is clipped to length 1."""
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dar.ar_training_step(model, optimizer, images, LABELS)
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


# The tokenizer that it carries


def test_a_tokenizer_is_no_part_of_the_model(make_ar, small_tokenizer):
    model = make_ar()
    names = list(model.state_dict())
    model.attach_tokenizer(small_tokenizer)
    assert model.tokenizer is small_tokenizer
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "fields, message", [({"codebook_size": 50}, "64 .* 50"), ({"num_tokens": 24}, "32 .* 24")]
)
def test_a_tokenizer_of_other_tokens_is_refused(make_ar, make_tokenizer, fields, message):
    model = make_ar()
    with pytest.raises(ValueError, match=message):
        model.attach_tokenizer(make_tokenizer(**fields))
    assert model.tokenizer is None
