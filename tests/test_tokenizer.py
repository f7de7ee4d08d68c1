"""Chapter 5, the tokenizer: the authors' numbers, what may know what, decoding, the training losses, wrong input."""

import dataclasses

import pytest
import synthetic
import torch

import dar

# The authors' public implementation on weights that follow from a seed (data/synthetic.py)


@pytest.fixture(scope="module")
def authors(golden_tokenizer) -> dar.SequentialDiffusionTokenizer:
    """A tokenizer with the golden weights, renamed here so that chapter 9 may be wrong."""
    config = dar.TokenizerConfig(
        image_size=128,
        encoder_width=128,
        encoder_layers=2,
        decoder_width=128,
        decoder_layers=2,
        num_tokens=32,
        codebook_size=256,
        diffusion_width=128,
        diffusion_layers=3,
        group_rule="nearest",
        repa_layer=1,
    )
    tokenizer, released = dar.SequentialDiffusionTokenizer(config), synthetic.synthetic_state_dict(golden_tokenizer)
    renamed = {
        "quant_in.": "quant_in_conv.",
        "quant_out.": "quant_out_conv.",
        "diffusion.": "diff_decoder.net.",
        "patch_in.": "conv_in.",
        "patch_out.": "conv_out.",
        "repa_head.": "repa_out.",
    }
    state = {}
    for name, own in tokenizer.state_dict().items():
        released_name = name
        for ours, theirs in renamed.items():
            released_name = released_name.replace(ours, theirs)
        state[name] = released[released_name].view(own.shape)  # 1x1 convolutions are our Linears
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def pixels(u8) -> torch.Tensor:
    return torch.from_numpy(u8).float() / 127.5 - 1


def assert_agree(ours: torch.Tensor, golden) -> None:
    golden = torch.as_tensor(golden)
    assert ours.shape == golden.shape
    assert (ours.detach() - golden).abs().max() <= 1e-4 * golden.abs().max()


def test_codes_of_the_authors(authors, golden_tokenizer):
    codes = authors.encode(pixels(golden_tokenizer["images_u8"]))
    assert codes.dtype == torch.int64 and torch.equal(codes, torch.from_numpy(golden_tokenizer["codes"]))


def test_z_prime_of_the_authors(authors, golden_tokenizer):
    assert_agree(authors.condition(torch.from_numpy(golden_tokenizer["codes"])), golden_tokenizer["cond"])


@pytest.mark.parametrize(
    "name, num_steps, solver",
    [("adams2_8", None, "ab2"), ("euler_8", None, "euler"), ("adams2_4", 4, "ab2"), ("adams2_12", 12, "ab2")],
)
def test_pictures_of_the_authors(authors, golden_tokenizer, name, num_steps, solver):
    noise = synthetic.initial_noise(golden_tokenizer, 2, 128)
    images = authors.decode(torch.from_numpy(golden_tokenizer["codes"]), noise, num_steps, solver)
    assert_agree(images[..., ::2, ::2], golden_tokenizer[name])


def test_preview_of_the_authors_after_four_steps(authors, golden_tokenizer):
    noise, codes = synthetic.initial_noise(golden_tokenizer, 2, 128), torch.from_numpy(golden_tokenizer["codes"])
    preview = authors.previews(codes, noise, solver="euler")[3]
    assert_agree(preview[..., ::2, ::2], golden_tokenizer["euler_8_clip4"])


def test_training_forward_of_the_authors(authors, golden_tokenizer):
    golden, noise = golden_tokenizer, synthetic.initial_noise(golden_tokenizer, 2, 128)
    out = authors(pixels(golden["images_u8"]), s=torch.from_numpy(golden["train_s"]), noise=noise)
    assert_agree(out["fm"], golden["train_fm_loss"])
    assert_agree(out["vq"], golden["train_vq_loss"])
    assert_agree(out["commit"], golden["train_commit_loss"])
    assert_agree(out["pred_image"][..., ::2, ::2], golden["train_pred_image"])
    assert_agree(out["repa"], golden["train_h_repa"])


def test_training_forward_of_the_authors_at_256_pixels(authors, golden_tokenizer):
    golden, noise = golden_tokenizer, synthetic.initial_noise(golden_tokenizer, 1, 256, offset=2)
    out = authors(pixels(golden["image256_u8"]), s=torch.from_numpy(golden["image256_s"]), noise=noise)
    assert_agree(out["fm"], golden["image256_fm_loss"])
    assert_agree(out["repa"][:, ::4, ::8], golden["image256_h_repa"])  # here REPA pools 2x2 patches


# Size


@pytest.mark.parametrize("preset, total, repa_head", [("v1", 307_444_672, 7_344_896), ("lite", 113_433_536, 6_820_608)])
def test_parameter_counts_of_the_paper(preset, total, repa_head):
    config = dar.TOKENIZER_PRESETS[preset]
    with torch.device("meta"):
        tokenizer = dar.SequentialDiffusionTokenizer(config)
        headless = dar.SequentialDiffusionTokenizer(dataclasses.replace(config, repa_layer=None))
    assert sum(p.numel() for p in tokenizer.parameters()) == total
    assert sum(p.numel() for p in headless.parameters()) == total - repa_head


def test_presets_for_training_from_scratch_follow_eq5():
    shift = {"shapes": 4, "cifar10": 8}
    for name, config in dar.TOKENIZER_PRESETS.items():
        assert config.group_rule == "ceil" and config.time_shift == shift.get(name, 2)


def test_tiny_is_small():
    config = dar.TOKENIZER_PRESETS["tiny"]
    with torch.device("meta"):
        tokenizer = dar.SequentialDiffusionTokenizer(config)
    assert config.image_size == 32 and sum(p.numel() for p in tokenizer.parameters()) < 10_000_000


# Helpers for the rest


def images_of(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size) * 2 - 1


def codes_of(batch: int = 2, n: int = 32) -> torch.Tensor:
    return torch.randint(64, (batch, n))


def other(codes: torch.Tensor, where) -> torch.Tensor:
    """The codes with all those at [:, where] replaced by others."""
    codes = codes.clone()
    codes[:, where] = (codes[:, where] + 1 + torch.randint(62, codes[:, where].shape)) % 64
    return codes


def record(monkeypatch, tokenizer) -> list:
    """A list that fills with the (x_t, t, condition) of each call of the diffusion decoder."""
    calls, forward = [], tokenizer.diffusion.forward

    def recorded(x_t, t, condition, **kwargs):
        calls.append((x_t, t, condition))
        return forward(x_t, t, condition, **kwargs)

    monkeypatch.setattr(tokenizer.diffusion, "forward", recorded)
    return calls


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# What may know what: encoder


@torch.no_grad()
def test_a_query_sees_no_later_query_and_a_patch_sees_none(make_tokenizer):
    tokenizer, images, patches = make_tokenizer(), images_of(), []
    tokenizer.encoder_layers[-1].register_forward_hook(lambda *args: patches.append(args[-1][:, :16]))
    before = tokenizer.encoder(images)
    tokenizer.query_embedding.weight[10] += 1
    change = (tokenizer.encoder(images) - before).abs().amax((0, 2))
    assert change[:10].max() < 1e-5 and change[10:].min() > 1e-4
    torch.testing.assert_close(patches[0], patches[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_query_sees_every_patch(small_tokenizer):
    images = images_of(1)
    before = small_tokenizer.encoder(images)
    for row in range(4):
        for column in range(4):
            changed = images.clone()
            changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.rand(1, 3, 8, 8)
            assert (small_tokenizer.encoder(changed) - before).abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_patches_know_their_place(small_tokenizer):
    images = images_of(1)
    for axis in (2, 3):
        moved = images.roll(8, axis)  # the same patches, each one place further
        assert (small_tokenizer.encoder(moved) - small_tokenizer.encoder(images)).abs().max() > 1e-2


@torch.no_grad()
def test_only_the_first_n_rows_of_the_tables_are_used(make_tokenizer):
    tokenizer, images, codes = make_tokenizer(), images_of(), codes_of()
    features, z = tokenizer.encoder(images), tokenizer.condition(codes)
    tokenizer.query_embedding.weight[32:] += 1
    tokenizer.decoder_embedding.weight[32:] += 1
    assert torch.equal(tokenizer.encoder(images), features) and torch.equal(tokenizer.condition(codes), z)


@torch.no_grad()
def test_encode_is_the_search_for_the_features(small_tokenizer):
    images = images_of(3)
    codes = small_tokenizer.encode(images)
    assert codes.shape == (3, 32) and codes.dtype == torch.int64
    assert torch.equal(codes, small_tokenizer.quantize.nearest_code(small_tokenizer.encoder(images)))
    for i in range(3):
        assert_close(small_tokenizer.encoder(images[i : i + 1]), small_tokenizer.encoder(images)[i : i + 1])


# What may know what: causal decoder


@torch.no_grad()
def test_changing_a_token_changes_no_z_prime_before_it_and_every_one_from_it_on(small_tokenizer):
    codes = codes_of()
    before = small_tokenizer.condition(codes)
    assert before.shape == (2, 32, 128)
    for i in range(32):
        change = (small_tokenizer.condition(other(codes, i)) - before).abs().amax((0, 2))
        assert i == 0 or change[:i].max() < 1e-5
        assert change[i:].min() > 1e-4


@torch.no_grad()
def test_z_prime_of_a_fresh_tokenizer_already_depends_on_the_codes():
    config = dar.TokenizerConfig(
        encoder_layers=0, decoder_layers=2, diffusion_layers=1, repa_layer=None, codebook_size=64
    )
    z = dar.SequentialDiffusionTokenizer(config).condition(codes_of(20, 256))
    assert z.std(0).mean() > 0.9  # z' has variance 1: nearly all of it is due to the codes, not to the positions


@torch.no_grad()
def test_z_prime_of_a_prefix_is_the_prefix_of_z_prime(small_tokenizer):
    codes = codes_of()
    z = small_tokenizer.condition(codes)
    for n in (1, 5, 31):
        assert_close(small_tokenizer.condition(codes[:, :n]), z[:, :n])


# Decoding


@pytest.mark.parametrize("rule", ["ceil", "nearest"])
@pytest.mark.parametrize("num_steps", [None, 4, 8, 13])
def test_a_denoising_step_sees_its_group_alone(make_tokenizer, monkeypatch, rule, num_steps):
    tokenizer, codes = make_tokenizer(group_rule=rule), codes_of()
    calls, z = record(monkeypatch, tokenizer), tokenizer.condition(codes)
    tokenizer.decode(codes, num_steps=num_steps)
    steps = num_steps or 8
    groups = [i * 8 // steps if rule == "ceil" else min((16 * i + steps) // (2 * steps), 7) for i in range(steps)]
    assert len(calls) == steps
    for group, (_, _, condition) in zip(groups, calls):
        assert_close(condition, z[:, 4 * group : 4 * group + 4])


def test_changing_a_group_changes_no_preview_before_its_step(small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    before = small_tokenizer.previews(codes, noise)
    for k in range(8):
        change = small_tokenizer.previews(other(codes, slice(4 * k, 4 * k + 4)), noise) - before
        change = change.abs().flatten(1).amax(1)
        assert k == 0 or change[:k].max() < 1e-4
        assert change[k:].min() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("num_steps", [None, 1, 5, 12])
def test_decoding_and_previews_are_the_sampling_loop_of_eq8(small_tokenizer, solver, num_steps):
    codes, noise, steps = codes_of(), torch.randn(2, 3, 32, 32), num_steps or 8
    z, x, v_prev, previews = small_tokenizer.condition(codes), noise, None, []
    for i in range(steps):
        s, s_next = i / steps, (i + 1) / steps
        t, t_next, k = s / (s + 2 * (1 - s)), s_next / (s_next + 2 * (1 - s_next)), i * 8 // steps
        v = small_tokenizer.diffusion(x, torch.tensor([t, t]), z[:, 4 * k : 4 * k + 4])[0]
        previews.append((x + (1 - t) * v) / 0.6)
        average = v if solver == "euler" or v_prev is None else (3 * v - v_prev) / 2
        x, v_prev = x + (t_next - t) * average, v
    assert_close(small_tokenizer.decode(codes, noise, num_steps, solver), x / 0.6)
    assert_close(small_tokenizer.previews(codes, noise, num_steps, solver), torch.stack(previews))


def test_the_config_may_say_another_number_of_steps(make_tokenizer, small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    four = make_tokenizer(num_steps=4)
    assert torch.equal(four.decode(codes, noise), small_tokenizer.decode(codes, noise, num_steps=4))
    assert len(four.previews(codes, noise)) == 4 and len(four.previews(codes, noise, num_steps=6)) == 6


def test_the_last_preview_is_the_picture_with_euler_and_close_to_it_with_ab2(small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    assert_close(
        small_tokenizer.previews(codes, noise, solver="euler")[-1], small_tokenizer.decode(codes, noise, None, "euler")
    )
    preview, image = small_tokenizer.previews(codes, noise)[-1], small_tokenizer.decode(codes, noise)
    assert 1e-3 < (preview - image).abs().max() < image.abs().max()


def test_ab2_is_the_default_solver(small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    images = [small_tokenizer.decode(codes, noise, None, *solver) for solver in ((), ("ab2",), ("euler",))]
    assert torch.equal(images[0], images[1]) and not torch.allclose(images[0], images[2], atol=1e-2)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_fewer_groups_decode_to_the_last_preview_they_allow(small_tokenizer, solver):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    previews = small_tokenizer.previews(codes, noise, solver=solver)
    assert previews.shape == (8, 2, 3, 32, 32)
    for k in range(1, 8):
        partial = small_tokenizer.decode(codes[:, : 4 * k], noise, solver=solver)
        assert_close(partial, previews[k - 1])
        assert_close(small_tokenizer.previews(codes[:, : 4 * k], noise, solver=solver), previews[:k])


def test_a_group_without_a_step_leaves_the_preview_before_it(small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    two_groups = small_tokenizer.decode(codes[:, :8], noise, num_steps=4)  # four steps: groups 0, 2, 4, 6
    assert_close(two_groups, small_tokenizer.previews(codes, noise, num_steps=4)[0])


def test_a_group_with_several_steps_decodes_to_the_preview_of_its_last(small_tokenizer):
    codes, noise = codes_of(), torch.randn(2, 3, 32, 32)
    two_groups = small_tokenizer.decode(codes[:, :8], noise, num_steps=24)  # three steps for each group
    assert_close(two_groups, small_tokenizer.previews(codes, noise, num_steps=24)[5])


def test_denoise_hands_out_pictures_as_groups_come_in(small_tokenizer):
    codes, noise, asked = codes_of(), torch.randn(2, 3, 32, 32), []
    groups = (asked.append(k) or codes[:, 4 * k : 4 * k + 4] for k in range(8))
    rounds = []
    for step in small_tokenizer.denoise(groups, noise):
        rounds.append(step)
        assert len(asked) == len(rounds) == len(step.previews) and torch.is_grad_enabled()
        assert torch.equal(step.codes, codes[:, : 4 * len(rounds)]) and step.preview is step.previews[-1]
    assert_close(rounds[-1].x, small_tokenizer.decode(codes, noise))
    assert_close(torch.stack([step.preview for step in rounds]), small_tokenizer.previews(codes, noise))


def test_noise_sets_the_size_and_else_the_config_does(small_tokenizer):
    codes = codes_of()
    assert small_tokenizer.decode(codes).shape == (2, 3, 32, 32)
    for height, width in ((16, 16), (48, 20)):
        noise = torch.randn(2, 3, height, width)
        assert small_tokenizer.decode(codes, noise).shape == noise.shape
        assert small_tokenizer.previews(codes, noise).shape == (8, *noise.shape)


def test_decode_draws_fresh_noise_when_it_is_given_none(small_tokenizer):
    codes = codes_of()
    assert not torch.allclose(small_tokenizer.decode(codes), small_tokenizer.decode(codes), atol=1e-2)
    torch.manual_seed(7)
    drawn = small_tokenizer.decode(codes)
    torch.manual_seed(7)
    assert torch.equal(drawn, small_tokenizer.decode(codes, torch.randn(2, 3, 32, 32)))


def test_other_image_sizes_encode_to_the_same_number_of_tokens(small_tokenizer):
    for height, width in ((16, 40), (64, 64)):
        assert small_tokenizer.encode(torch.rand(2, 3, height, width)).shape == (2, 32)


def test_a_picture_does_not_depend_on_its_batch(small_tokenizer):
    codes, noise = codes_of(3), torch.randn(3, 3, 32, 32)
    together = small_tokenizer.decode(codes, noise)
    for i in range(3):
        assert_close(small_tokenizer.decode(codes[i : i + 1], noise[i : i + 1]), together[i : i + 1])


def test_encoding_and_decoding_build_no_autograd_graph(small_tokenizer):
    images, kept = images_of(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(1), lambda x: x):
        codes = small_tokenizer.encode(images)
        assert not small_tokenizer.decode(codes).requires_grad and not small_tokenizer.previews(codes).requires_grad
        assert not kept
        assert small_tokenizer.condition(codes).requires_grad and kept  # the causal decoder itself can be trained


# Training


@pytest.mark.parametrize("rule, kept", [("ceil", [4, 12, 32]), ("nearest", [4, 16, 32])])
def test_quantizer_losses_count_the_tokens_up_to_the_end_of_the_drawn_group(make_tokenizer, rule, kept):
    tokenizer, images = make_tokenizer(group_rule=rule), images_of(3)
    out = tokenizer(images, s=torch.tensor([0.0, 0.32, 0.99]))
    assert out["kept"].item() == sum(kept)
    f = torch.nn.functional.normalize(tokenizer.encoder(images), dim=-1)
    squared = (f - tokenizer.quantize.codebook()[out["codes"]]).pow(2).mean(-1)  # [3, 32]
    mean = sum(squared[b, :n].sum() for b, n in enumerate(kept)) / sum(kept)
    assert_close(out["vq"], mean)
    assert_close(out["commit"], 0.25 * mean)
    assert abs(mean - squared.mean()) > 1e-3 * mean


@pytest.mark.parametrize("rule, groups", [("ceil", [0, 2, 7]), ("nearest", [0, 3, 7])])
def test_the_training_step_by_hand(make_tokenizer, monkeypatch, rule, groups):
    tokenizer = make_tokenizer(group_rule=rule, time_shift=3.0, data_scale=0.5, commit_weight=0.1)
    images, noise, s = images_of(3), torch.randn(3, 3, 32, 32), torch.tensor([0.0, 0.32, 0.99])
    calls = record(monkeypatch, tokenizer)
    out = tokenizer(images, s, noise)
    ((x_t, t, condition),) = calls
    times = s / (s + 3 * (1 - s))
    assert_close(t, times)
    t = times[:, None, None, None]
    assert_close(x_t, t * 0.5 * images + (1 - t) * noise)
    z = tokenizer.condition(tokenizer.encode(images))
    assert_close(condition, torch.stack([z[b, 4 * k : 4 * k + 4] for b, k in enumerate(groups)]))
    velocity = tokenizer.diffusion(x_t, times, condition)[0]
    assert_close(out["fm"], (velocity - (0.5 * images - noise)).pow(2).mean() / 0.25)
    assert_close(out["pred_image"], (x_t + (1 - t) * velocity) / 0.5)
    assert_close(out["commit"], 0.1 * out["vq"])
    assert torch.equal(out["codes"], tokenizer.encode(images))
    assert "repa" not in out


def test_several_times_for_an_image_are_as_many_training_steps_on_it(small_tokenizer):
    images, s, noise = images_of(2), torch.tensor([[0.1, 0.9, 0.3], [0.6, 0.2, 0.4]]), torch.randn(2, 3, 3, 32, 32)
    out = small_tokenizer(images, s, noise)
    single = [small_tokenizer(images, s[:, r], noise[:, r]) for r in range(3)]
    assert_close(out["fm"], torch.stack([step["fm"] for step in single]).mean())
    expected = torch.stack([step["pred_image"] for step in single], 1).flatten(0, 1)  # each image's times together
    assert_close(out["pred_image"], expected)
    last = small_tokenizer(images, s.amax(1))  # tokens up to the latest of an image's groups mattered
    assert out["kept"] == last["kept"] == 32 + 20
    assert_close(out["vq"], last["vq"])
    assert torch.equal(out["codes"], single[0]["codes"])


@torch.no_grad()
def test_times_are_drawn_uniformly_in_s_and_noise_is_standard_normal(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(encoder_layers=0, decoder_layers=0, diffusion_layers=1, image_size=8)
    calls = record(monkeypatch, tokenizer)
    tokenizer(torch.zeros(1000, 3, 8, 8))
    x_t, t, _ = calls[0]
    s = (t / (t + (1 - t) / 2)).sort().values
    assert (s - torch.linspace(0, 1, 1000)).abs().max() < 0.06  # Kolmogorov-Smirnov at 0.1%
    noise = x_t / (1 - t[:, None, None, None])  # the images are zero
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert noise.flatten(1).T.cov().sub(torch.eye(192)).abs().max() < 0.25  # no two pixels share theirs


def test_every_parameter_learns_from_the_losses(make_tokenizer):
    tokenizer = make_tokenizer(repa_layer=1)
    out = tokenizer(images_of(4), s=torch.tensor([0.1, 0.4, 0.7, 0.99]))
    (out["fm"] + out["vq"] + out["commit"] + out["repa"].pow(2).mean()).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_the_encoder_learns_from_the_velocity_through_the_quantizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer(images_of(), s=torch.tensor([0.4, 0.7]))["fm"].backward()
    assert tokenizer.patchify.weight.grad.any() and tokenizer.query_embedding.weight.grad[:20].any()
    assert not tokenizer.query_embedding.weight.grad[24:].any()  # tokens behind group 5 could not matter
    assert tokenizer.quantize.embedding.weight.grad is None


def test_before_there_is_a_codebook_the_features_go_on_with_noise(make_tokenizer, monkeypatch):
    tokenizer, images, passed = make_tokenizer(), images_of(), []
    causal_decoder = tokenizer.causal_decoder
    monkeypatch.setattr(tokenizer, "causal_decoder", lambda z: passed.append(z) or causal_decoder(z))
    code_noise = 0.18 * torch.randn(2, 32, 8)
    out = tokenizer(images, s=torch.tensor([0.4, 0.7]), code_noise=code_noise)
    f = torch.nn.functional.normalize(tokenizer.encoder(images), dim=-1)
    assert_close(passed[0], torch.nn.functional.normalize(f + code_noise, dim=-1))
    assert_close(passed[0].norm(dim=-1), torch.ones(2, 32))
    assert torch.equal(out["codes"], tokenizer.encode(images))
    assert out["vq"] == out["commit"] == 0
    out["fm"].backward()
    assert tokenizer.patchify.weight.grad.any() and tokenizer.quantize.embedding.weight.grad is None


def test_losses_are_float32_under_bfloat16_autocast(small_tokenizer):
    images, s, noise = images_of(), torch.tensor([0.4, 0.99]), torch.randn(2, 3, 32, 32)
    full = small_tokenizer(images, s, noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = small_tokenizer(images, s, noise)
    for name in ("fm", "vq", "commit"):
        assert low[name].dtype == torch.float32 and low[name].item() == pytest.approx(full[name].item(), rel=0.1)


# The loss, eq. 7


def test_the_terms_of_the_loss_have_their_weights(make_tokenizer):
    tokenizer, images = make_tokenizer(repa_layer=1), images_of()
    s, noise, target = torch.rand(2, 3), torch.randn(2, 3, 3, 32, 32), torch.randn(2, 64, 768)
    out = tokenizer(images, s, noise)
    plain = dar.tokenizer_loss(out, images)
    assert list(plain) == ["fm", "vq", "commit"] and all(plain[name] is out[name] for name in plain)

    def distance(predicted, image):  # [B·R, 3, H, W] twice: each time of an image beside that image
        assert torch.equal(image, images[[0, 0, 0, 1, 1, 1]]) and torch.equal(predicted, out["pred_image"])
        return (predicted - image).abs().mean((1, 2, 3))

    whole = dar.tokenizer_loss(out, images, distance, 0.5, target, 0.25)
    assert list(whole) == ["fm", "vq", "commit", "lpips", "repa"]
    assert_close(whole["lpips"], 0.5 * (out["pred_image"] - images.repeat_interleave(3, 0)).abs().mean())
    a, b = out["repa"], target[[0, 0, 0, 1, 1, 1]]
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert_close(whole["repa"], 0.25 * (1 - cosine.mean()))


# Wrong input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_tokens": 30}, r"N = 30 .*K = 8"),
        ({"image_size": 250}, r"250 .*encoder_patch = 16"),
        ({"image_size": 32, "diffusion_patch": 12}, r"32 .*diffusion_patch = 12"),
        ({"num_tokens": 2048}, r"2048 .*1024"),
        ({"encoder_width": 100}, r"encoder_width = 100: .*64"),
        ({"decoder_width": 32}, r"decoder_width = 32: .*64"),
        ({"diffusion_width": 700}, r"diffusion_width = 700: .*64"),
        ({"repa_layer": 12}, r"repa_layer = 12 .*diffusion_layers = 12"),
        ({"group_rule": "floor"}, r"'floor'"),
        ({"num_groups": 0}, r"num_groups = 0"),
        ({"codebook_size": 0}, r"codebook_size = 0"),
        ({"diffusion_layers": 0, "repa_layer": None}, r"diffusion_layers = 0"),
        ({"encoder_layers": -1}, r"encoder_layers = -1"),
        ({"num_steps": 2.5}, r"num_steps = 2.5"),
        ({"time_shift": 0.0}, r"time_shift = 0"),
        ({"data_scale": -0.6}, r"data_scale = -0.6"),
        ({"data_scale": float("nan")}, r"data_scale = nan"),
        ({"image_size": "256"}, r"image_size = '256'"),
    ],
)
def test_a_config_that_cannot_be_built_says_which_value_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        dar.TokenizerConfig(**fields)


def test_the_group_size_is_n_over_k():
    assert dar.TokenizerConfig().group_size == 32 and dar.TokenizerConfig(num_groups=16).group_size == 16


@pytest.mark.parametrize(
    "shape, message", [((2, 3, 32, 30), "32, 30"), ((3, 32, 32), "3, 32, 32"), ((2, 1, 32, 32), "1")]
)
def test_images_of_a_wrong_shape_are_refused(small_tokenizer, shape, message):
    for call in (small_tokenizer.encode, small_tokenizer):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


def test_noise_of_a_wrong_shape_is_refused(small_tokenizer):
    for shape, message in (((2, 3, 32, 30), "32, 30"), ((2, 4, 32, 32), "2, 4, 32, 32"), ((2, 3, 0, 0), "3, 0, 0")):
        for call in (small_tokenizer.decode, small_tokenizer.previews):
            with pytest.raises(ValueError, match=message):
                call(codes_of(), torch.zeros(shape))


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(2, 36, dtype=torch.int64), r"36.*at most 32"),
        (torch.zeros(32, dtype=torch.int64), r"\[32\]"),
        (torch.zeros(2, 32, dtype=torch.int32), r"int32.*int64"),
        (torch.zeros(2, 32), r"float32.*int64"),
        (torch.full((2, 32), 64), r"64 .*0 ... 63"),
        (torch.full((2, 32), -1), r"-1 .*0 ... 63"),
    ],
)
def test_codes_that_are_none_are_refused(small_tokenizer, codes, message):
    for call in (small_tokenizer.condition, small_tokenizer.decode, small_tokenizer.previews):
        with pytest.raises(ValueError, match=message):
            call(codes)


def test_decoding_takes_whole_groups(small_tokenizer):
    for n in (0, 1, 6, 31):
        for call in (small_tokenizer.decode, small_tokenizer.previews):
            with pytest.raises(ValueError, match=rf"{n}\]: decoding takes whole groups of 4"):
                call(codes_of(n=n))


def test_a_wrong_solver_or_number_of_steps_is_refused(small_tokenizer):
    with pytest.raises(ValueError, match="'heun'"):
        small_tokenizer.decode(codes_of(), solver="heun")
    with pytest.raises(ValueError, match="-1 sampling steps"):
        small_tokenizer.decode(codes_of(), num_steps=-1)
