"""Chapter 5, the tokenizer: the authors' numbers, who may know what, and how it is trained.

What decode() draws is tested with chapter 7."""

import copy

import pytest
import synthetic
import torch
import torch.nn.functional as F

import dar


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32) * 2 - 1


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(64, (2, 32))


def change_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How much each token changed: [B, n, C] twice -> [n]."""
    return (a - b).abs().amax((0, 2))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# The authors' numbers


def assert_agree(ours, golden):
    golden = torch.as_tensor(golden)
    assert ours.shape == golden.shape
    assert (ours.detach() - golden).abs().max() <= 1e-4 * golden.abs().max()


def pixels(u8) -> torch.Tensor:
    return torch.from_numpy(u8).float() / 127.5 - 1


@pytest.fixture
def golden(golden_tokenizer):
    return golden_tokenizer


@pytest.fixture
def golden_codes(golden):
    return torch.from_numpy(golden["codes"])


def test_codes_of_the_authors(authors_tokenizer, golden, golden_codes):
    features = authors_tokenizer.encoder(pixels(golden["images_u8"]))  # images of 64 pixels
    codes = authors_tokenizer.quantize.nearest_code(features)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, golden_codes)


def test_z_prime_of_the_authors(authors_tokenizer, golden, golden_codes):
    assert_agree(authors_tokenizer.condition(golden_codes), golden["cond"])


@pytest.mark.parametrize(
    "name, num_steps, solver",
    [
        ("adams2_8", None, "ab2"),
        ("euler_8", None, "euler"),
        ("adams2_4", 4, "ab2"),
        ("adams2_12", 12, "ab2"),
    ],
)
def test_pictures_of_the_authors(authors_tokenizer, golden, golden_codes, name, num_steps, solver):
    noise = synthetic.initial_noise(golden, 2, 128)
    pictures = authors_tokenizer.decode(golden_codes, noise, num_steps, solver)
    assert_agree(pictures[..., ::2, ::2], golden[name])


def test_preview_of_the_authors(authors_tokenizer, golden, golden_codes):
    noise = synthetic.initial_noise(golden, 2, 128)
    fourth = authors_tokenizer.previews(golden_codes, noise, solver="euler")[3]
    assert_agree(fourth[..., ::2, ::2], golden["euler_8_clip4"])


def test_training_of_the_authors(authors_tokenizer, golden):
    noise = synthetic.initial_noise(golden, 2, 128)
    s = torch.from_numpy(golden["train_s"])
    out = authors_tokenizer(pixels(golden["images_u8"]), s, noise)
    assert_agree(out["fm"], golden["train_fm_loss"])
    assert_agree(out["vq"], golden["train_vq_loss"])
    assert_agree(out["commit"], golden["train_commit_loss"])
    assert_agree(out["pred_image"][..., ::2, ::2], golden["train_pred_image"])
    assert_agree(out["repa"], golden["train_h_repa"])


def test_training_of_the_authors_at_256_pixels(authors_tokenizer, golden):
    """Here REPA averages 2x2 patches."""
    noise = synthetic.initial_noise(golden, 1, 256, offset=2)
    s = torch.from_numpy(golden["image256_s"])
    out = authors_tokenizer(pixels(golden["image256_u8"]), s, noise)
    assert_agree(out["fm"], golden["image256_fm_loss"])
    assert_agree(out["repa"][:, ::4, ::8], golden["image256_h_repa"])


# Configs and sizes


@pytest.mark.parametrize(
    "preset, millions",
    [("v1", 307.44), ("lite", 113.43), ("tiny", 4.4), ("shapes", 0.6), ("cifar10", 4.4)],
)
def test_parameters_of_the_presets(preset, millions):
    with torch.device("meta"):
        tokenizer = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS[preset])
    count = sum(p.numel() for p in tokenizer.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    if preset == "v1":
        assert count == 307_444_672


def test_presets_are_as_the_table_of_numbers_says():
    scales = {name: config.data_scale for name, config in dar.TOKENIZER_PRESETS.items()}
    assert scales == {"v1": 0.6, "lite": 0.6, "tiny": 0.6, "shapes": 1, "cifar10": 0.6}
    betas = {name: config.time_shift for name, config in dar.TOKENIZER_PRESETS.items()}
    assert betas == {"v1": 2, "lite": 2, "tiny": 2, "shapes": 4, "cifar10": 8}
    assert {config.group_rule for config in dar.TOKENIZER_PRESETS.values()} == {"ceil"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_tokens": 30}, "N = 30 .*8 equal groups"),
        ({"num_tokens": 2048}, "N = 2048 .*1024"),
        ({"num_groups": 0}, "0 equal groups"),
        ({"image_size": 250}, "250 .*encoder_patch = 16"),
        ({"image_size": 32, "diffusion_patch": 12}, "32 .*diffusion_patch = 12"),
        ({"encoder_width": 100}, "encoder_width = 100: .*64"),
        ({"decoder_width": 32}, "decoder_width = 32: .*64"),
        ({"diffusion_width": 0}, "diffusion_width = 0: .*64"),
        ({"codebook_size": 0}, "0 codes"),
        ({"diffusion_layers": 0, "repa_layer": None}, "diffusion_layers=0"),
        ({"encoder_layers": -1}, "encoder_layers=-1"),
        ({"repa_layer": 12}, "repa_layer = 12.*12"),
        ({"group_rule": "floor"}, "'floor'"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"time_shift": 0.0}, "time_shift=0"),
        ({"data_scale": float("nan")}, "data_scale=nan"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dar.TokenizerConfig(**fields)


# Encoder: who may know what


@torch.no_grad()
def test_a_query_reads_no_later_query_and_a_patch_none(make_tokenizer, images):
    tokenizer = make_tokenizer()
    patches = []
    last = tokenizer.encoder_layers[-1]
    last.register_forward_hook(lambda module, args, out: patches.append(out[:, :16]))
    before = tokenizer.encoder(images)
    tokenizer.query_embedding.weight[10] += 1
    change = change_of(tokenizer.encoder(images), before)
    assert change[:10].max() < 1e-5
    assert change[10:].min() > 1e-4
    torch.testing.assert_close(patches[1], patches[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_query_reads_every_patch(small_tokenizer, images):
    before = small_tokenizer.encoder(images)
    for row in range(4):
        for column in range(4):
            changed = images.clone()
            changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] *= -1
            assert change_of(small_tokenizer.encoder(changed), before).min() > 1e-4


@torch.no_grad()
def test_only_the_first_n_rows_of_the_tables_are_used(make_tokenizer, images, codes):
    tokenizer = make_tokenizer()  # max_tokens = 40, N = 32
    features = tokenizer.encoder(images)
    z_prime = tokenizer.condition(codes)
    tokenizer.query_embedding.weight[32:] += 1
    tokenizer.decoder_embedding.weight[32:] += 1
    assert torch.equal(tokenizer.encoder(images), features)
    assert torch.equal(tokenizer.condition(codes), z_prime)


# Causal decoder: who may know what


@torch.no_grad()
def test_z_prime_carries_the_tokens_before_it_and_no_later_one(small_tokenizer, codes):
    before = small_tokenizer.condition(codes)
    for i in range(32):
        changed = codes.clone()
        changed[:, i] = (codes[:, i] + 1) % 64
        change = change_of(small_tokenizer.condition(changed), before)
        assert change[:i].sum() < 1e-5
        assert change[i:].min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 31])
def test_z_prime_of_a_prefix_is_the_prefix_of_z_prime(small_tokenizer, codes, n):
    z_prime = small_tokenizer.condition(codes)
    assert_close(small_tokenizer.condition(codes[:, :n]), z_prime[:, :n])


@torch.no_grad()
def test_a_fresh_z_prime_already_depends_on_the_codes():
    tokenizer = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS["tiny"])
    z_prime = tokenizer.condition(torch.randint(1024, (50, 64)))
    assert z_prime.std(0).mean() > 0.9  # of a standard deviation of 1: positions add the rest


# The networks' part of a training step


@pytest.mark.parametrize("rule, groups", [("ceil", [0, 2]), ("nearest", [0, 3])])
def test_forward_by_hand(make_tokenizer, images, rule, groups):
    tokenizer = make_tokenizer(group_rule=rule, time_shift=3.0, data_scale=0.5, commit_weight=0.1)
    noise = torch.randn(2, 3, 32, 32)
    s = torch.tensor([0.05, 0.32])
    out = tokenizer(images, s, noise)

    t = s / (s + 3 * (1 - s))
    x1 = 0.5 * images
    x_t = torch.stack([t[i] * x1[i] + (1 - t[i]) * noise[i] for i in range(2)])
    z_prime = tokenizer.condition(tokenizer.encode(images))
    group_z = torch.stack([z_prime[i, 4 * k : 4 * k + 4] for i, k in enumerate(groups)])
    v = tokenizer.diffusion(x_t, t, group_z)[0]
    assert_close(out["fm"], (v - (x1 - noise)).pow(2).mean() / 0.5**2)
    jump = torch.stack([x_t[i] + (1 - t[i]) * v[i] for i in range(2)])
    assert_close(out["pred_image"], jump / 0.5)

    assert out["kept"] == sum(4 * (k + 1) for k in groups)
    f = F.normalize(tokenizer.encoder(images), dim=-1)
    error = (f - tokenizer.quantize.lookup(out["codes"])).pow(2).mean(-1)  # [B, N]
    kept = torch.cat([error[i, : 4 * (k + 1)] for i, k in enumerate(groups)])
    assert_close(out["vq"], kept.mean())
    assert_close(out["commit"], 0.1 * kept.mean())
    assert "repa" not in out


def test_several_times_are_as_many_steps_with_one_encoding(make_tokenizer, images):
    tokenizer = make_tokenizer()
    s = torch.tensor([[0.1, 0.9, 0.3], [0.6, 0.2, 0.4]])
    noise = torch.randn(2, 3, 3, 32, 32)
    single = [tokenizer(images, s[:, r].contiguous(), noise[:, r]) for r in range(3)]
    encodings = []
    tokenizer.patchify.register_forward_hook(lambda *_: encodings.append(1))
    out = tokenizer(images, s, noise)
    assert len(encodings) == 1
    assert_close(out["fm"], torch.stack([step["fm"] for step in single]).mean())
    jumps = torch.stack([step["pred_image"] for step in single], 1)  # [B, R, ...]
    assert_close(out["pred_image"], jumps.flatten(0, 1))
    assert out["kept"] == 32 + 20  # up to the last of an image's groups: 7 and 4
    assert_close(out["vq"], tokenizer(images, s.amax(1))["vq"])


@torch.no_grad()
def test_times_and_noise_are_drawn(make_tokenizer):
    tokenizer = make_tokenizer(image_size=8, encoder_layers=0, diffusion_layers=1, time_shift=1)
    seen = []
    tokenizer.diffusion.register_forward_pre_hook(lambda module, args: seen.append(args))
    tokenizer(torch.zeros(1000, 3, 8, 8))
    x_t, t, _ = seen[0]
    uniform = torch.linspace(0, 1, 1000)
    assert (t.sort().values - uniform).abs().max() < 0.06
    noise = x_t / (1 - t[:, None, None, None])  # the images are zero
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_the_velocity_teaches_the_encoder_up_to_its_group(make_tokenizer, images):
    tokenizer = make_tokenizer()
    tokenizer(images, s=torch.tensor([0.4, 0.7]))["fm"].backward()  # groups 3 and 5
    learned = tokenizer.query_embedding.weight.grad.any(-1)
    assert learned[:24].all()
    assert not learned[24:].any()


def test_every_parameter_learns(make_tokenizer, images):
    tokenizer = make_tokenizer(repa_layer=1)
    out = tokenizer(images, s=torch.tensor([0.4, 0.99]))
    (out["fm"] + out["vq"] + out["commit"] + out["repa"].pow(2).mean()).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad.any(), name


# Codebook warm-up


def test_a_fresh_encoder_has_one_feature_for_each_query():
    tokenizer = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS["shapes"])
    f = tokenizer.encoder(torch.rand(8, 3, 16, 16) * 2 - 1)
    assert_close(f, f[:1].expand_as(f))  # for all images


def test_the_noise_is_as_long_as_a_quantizers_error():
    noise = dar.WARMUP_NOISE * torch.randn(1000, 8)
    assert noise.norm(dim=-1).mean().item() == pytest.approx(0.5, abs=0.05)
    rows = F.normalize(torch.randn(1024, 8), dim=-1)
    features = F.normalize(torch.randn(1000, 8), dim=-1)
    error = torch.cdist(features, rows).amin(-1)
    assert error.mean().item() == pytest.approx(0.5, abs=0.05)


def test_with_code_noise_nothing_is_looked_up(make_tokenizer, images, monkeypatch):
    tokenizer = make_tokenizer()
    seen = []
    decoder = tokenizer.causal_decoder
    monkeypatch.setattr(tokenizer, "causal_decoder", lambda z: seen.append(z) or decoder(z))
    code_noise = torch.randn(2, 32, 8)
    out = tokenizer(images, code_noise=code_noise)
    f = F.normalize(tokenizer.encoder(images), dim=-1)
    assert_close(seen[0], F.normalize(f + code_noise, dim=-1))
    assert out["vq"] == out["commit"] == 0


# The loss, and the training step


def test_eq7_has_its_weights(make_tokenizer, images):
    tokenizer = make_tokenizer(repa_layer=1)
    out = tokenizer(images, s=torch.rand(2, 3))
    target = torch.randn(2, 64, 768)
    each = [0, 0, 0, 1, 1, 1]  # the image of each jump estimate, for R = 3

    def distance(a, b):
        assert torch.equal(a, out["pred_image"])
        assert torch.equal(b, images[each])
        return torch.arange(6.0)

    terms = dar.tokenizer_loss(out, images, lpips=distance, repa_target=target)
    assert list(terms) == ["fm", "vq", "commit", "lpips", "repa"]
    assert terms["fm"] is out["fm"]
    assert terms["vq"] is out["vq"]
    assert terms["commit"] is out["commit"]
    assert terms["lpips"] == 0.5 * 2.5
    a = out["repa"]
    b = target[each]
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert_close(terms["repa"], 0.5 * (1 - cosine.mean()))


@pytest.mark.parametrize("updates, decay", [(0, 0.1), (10, 0.55), (10**6, 0.999)])
def test_ema_forgets_fast_at_first(updates, decay):
    ema = torch.nn.Linear(1, 1)
    model = torch.nn.Linear(1, 1)
    expected = decay * ema.weight + (1 - decay) * model.weight
    dar.update_ema(ema, model, updates)
    torch.testing.assert_close(ema.weight, expected)


@pytest.fixture
def trained(make_tokenizer):
    """A tokenizer, its average, and a function that takes a training step with them."""
    model = make_tokenizer().train()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

    def take_step(images, step, **settings):
        return dar.tokenizer_training_step(model, ema, optimizer, images, step, **settings)

    return model, ema, take_step


def test_training_steps_lower_the_loss(trained, images):
    _, _, take_step = trained
    losses = [take_step(images, step, times=2)["fm"].item() for step in range(20)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_training_step_moves_model_and_average(trained, images):
    model, ema, take_step = trained
    fresh = copy.deepcopy(model)
    take_step(images, 1)  # after one update, the decay is 2/11
    parameters = zip(fresh.parameters(), model.parameters(), ema.parameters())
    for before, after, average in parameters:
        torch.testing.assert_close(average, 2 / 11 * before + 9 / 11 * after)
    assert not torch.equal(model.patchify.weight, fresh.patchify.weight)


def test_a_step_is_no_longer_than_its_rate(make_tokenizer, images):
    """The gradient is clipped to length 1."""
    model = make_tokenizer()
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dar.tokenizer_training_step(model, copy.deepcopy(model), optimizer, 10 * images, 0)
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_warm_up_ends_with_features_as_codebook(trained, images):
    model, ema, take_step = trained
    fresh = model.quantize.embedding.weight.clone()
    images = torch.rand(4, 3, 32, 32) * 2 - 1  # 128 features for 64 rows
    for step in (0, 1):
        terms = take_step(images, step, codebook_warmup=2)
        assert terms["vq"] == terms["commit"] == 0
        assert torch.equal(model.quantize.embedding.weight, fresh)

    features = model.encoder(images).detach()
    terms = take_step(images, 2, codebook_warmup=2)
    assert terms["vq"] > 0
    f = F.normalize(features.flatten(0, 1), dim=-1)
    distance = torch.cdist(model.quantize.embedding.weight, f).amin(-1)
    assert distance.max() < 0.02  # features, and one step of Adam on


def test_after_warm_up_the_average_has_the_models_codes(trained):
    """Row by row: in an average, row i must not be of one feature in the model, of another here."""
    model, ema, take_step = trained
    take_step(torch.rand(4, 3, 32, 32) * 2 - 1, 150, codebook_warmup=150)
    rows = model.quantize.lookup(torch.arange(64))
    averaged = ema.quantize.lookup(torch.arange(64))
    assert torch.cdist(averaged, rows).argmin(-1).tolist() == list(range(64))


# Input that is refused


@pytest.mark.parametrize(
    "images, message",
    [
        (
            torch.zeros(1, 3, 512, 512),
            r"^images \[1, 3, 512, 512\]: expected \[B, 3, 32, 32\]; crop",
        ),
        (torch.zeros(2, 3, 32, 30), r"32, 30.*expected \[B, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\]: expected \[B, 3, 32, 32\]"),
        (torch.zeros(2, 1, 32, 32), "2, 1, 32, 32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8.*u / 127.5 - 1"),
        (torch.full((2, 3, 32, 32), 255.0), r"255.*\[-1, 1\]"),
    ],
    ids=["a photograph", "30 pixels", "no batch", "grey", "uint8", "up to 255"],
)
def test_images_of_another_kind_are_refused(small_tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer.encode(images)


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(2, 36, dtype=torch.int64), "36.* 32"),
        (torch.zeros(32, dtype=torch.int64), r"\[32\]"),
        (torch.zeros(2, 32, dtype=torch.bool), "bool.*expected integers"),
        (torch.zeros(2, 32), "float32.*expected integers"),
        (torch.full((2, 32), 64), "64.*0 ... 63"),
        (torch.full((2, 32), -1), "-1.*0 ... 63"),
    ],
    ids=["too many", "no batch", "bool", "float", "too large", "negative"],
)
@pytest.mark.parametrize("method", ["condition", "decode", "previews"])
def test_codes_of_another_kind_are_refused(small_tokenizer, codes, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(small_tokenizer, method)(codes)


@pytest.mark.parametrize("n", [0, 1, 6, 31])
def test_decoding_takes_whole_groups(small_tokenizer, codes, n):
    with pytest.raises(ValueError, match=f"{n}.*whole groups of 4"):
        small_tokenizer.decode(codes[:, :n])


@pytest.mark.parametrize("shape", [(2, 3, 32, 30), (2, 4, 32, 32), (2, 3, 0, 0), (1, 3, 32, 32)])
def test_noise_of_another_shape_is_refused(small_tokenizer, codes, shape):
    with pytest.raises(ValueError, match="32, 30|4, 32, 32|0, 0|noise for 1"):
        small_tokenizer.decode(codes, torch.zeros(shape))
