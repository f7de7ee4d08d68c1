"""Exercise 8: the losses and the codebook."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dar
from course.tests.support import check_close, check_equal, make_tokenizer

K = 4  # groups, of two tokens
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
S = torch.tensor([0.1, 0.6, 0.9])  # these times belong to the groups 0, 2 and 3


def velocity_of(x_t: Tensor, t: Tensor, group_z: Tensor) -> Tensor:
    return 0.3 * x_t + t.view(-1, 1, 1, 1) + group_z[..., 0].mean(1).view(-1, 1, 1, 1)


class StandInQuantizer(nn.Module):
    """Leaves features as they are, counts through the codes, and notes what is kept."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1, 1)
        self.weight = self.embedding.weight
        nn.init.constant_(self.weight, 2.0)
        self.kept = []

    def forward(self, f, keep):
        self.kept.append(keep)
        codes = torch.arange(f.shape[0] * f.shape[1]).view(f.shape[:2])
        return F.normalize(f.float(), dim=-1), codes, self.weight.sum() ** 2, 3 * self.weight.sum()


class StandInDecoder(nn.Module):
    """A velocity that is a formula, and a note of what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, group_z, repa=False):
        self.calls.append((x_t, t, group_z))
        features = group_z[:, :1] if repa else None
        return velocity_of(x_t, t, group_z), features


def learner(**fields) -> dar.SequentialDiffusionTokenizer:
    tokenizer = make_tokenizer(**fields)
    tokenizer.quantize = StandInQuantizer()
    tokenizer.diffusion = StandInDecoder()
    return tokenizer


def groups_of(tokenizer, z: Tensor) -> Tensor:
    """Code vectors -> z' [B, K, 2, C]."""
    return tokenizer.causal_decoder(z).unflatten(1, (K, 2))


def test_kept_are_the_tokens_up_to_the_end_of_the_last_group_drawn():
    tokenizer = make_tokenizer()
    keep = tokenizer.kept_tokens(S[:, None])
    assert keep.dtype == torch.bool, f"kept_tokens gives {keep.dtype}"
    check_equal("tokens kept at s = 0.1, 0.6, 0.9", keep.sum(1), [2, 6, 8])
    assert keep[:, :2].all(), "the first tokens are always kept"
    several = tokenizer.kept_tokens(torch.tensor([[0.9, 0.1], [0.1, 0.3]]))
    check_equal("the latest of two times counts", several.sum(1), [8, 4])


def test_the_velocity_is_asked_at_eq3s_point_with_the_group_of_its_time():
    tokenizer = learner()
    noise = torch.randn(3, 3, 8, 8)
    tokenizer(IMAGES, S, noise)
    assert tokenizer.diffusion.calls, "the diffusion decoder was not called"
    x_t, t, group_z = tokenizer.diffusion.calls[0]
    expected_t = S / (S + 3 * (1 - S))
    check_close("t is the shifted s", t, expected_t)
    check_close("x_t", x_t, dar.interpolate(noise, 0.5 * IMAGES, expected_t))
    z = groups_of(tokenizer, F.normalize(tokenizer.encoder(IMAGES), dim=-1))
    check_close("z' of groups 0, 2 and 3", group_z, torch.stack([z[0, 0], z[1, 2], z[2, 3]]))


def test_fm_is_the_velocitys_error_in_the_images_units():
    tokenizer = learner()
    noise = torch.randn(3, 3, 8, 8)
    out = tokenizer(IMAGES, S, noise)
    x_t, t, group_z = tokenizer.diffusion.calls[0]
    v = velocity_of(x_t, t, group_z)
    check_close("fm", out["fm"], (v - (0.5 * IMAGES - noise)).square().mean() / 0.25)
    check_close("pred_image", out["pred_image"], dar.jump_estimate(x_t, v, t) / 0.5)


def test_the_quantizers_losses_are_handed_on():
    tokenizer = learner(commit_weight=0.1)
    out = tokenizer(IMAGES, S)
    check_close("vq", out["vq"], 4.0)
    check_close("commit, with its weight", out["commit"], 0.6)
    check_equal("kept, of all tokens", int(out["kept"]), 16)
    check_equal("codes", out["codes"], torch.arange(24).view(3, 8))
    check_equal("what the quantizer is told to keep", tokenizer.quantize.kept[0].sum(1), [2, 6, 8])


def test_several_times_share_one_encoding():
    tokenizer = learner()
    noise = torch.randn(3, 2, 3, 8, 8)
    s = torch.tensor([[0.1, 0.9], [0.6, 0.2], [0.4, 0.99]])
    out = tokenizer(IMAGES, s, noise)
    check_equal("calls of the quantizer", len(tokenizer.quantize.kept), 1)
    for r in range(2):
        single = tokenizer(IMAGES, s[:, r], noise[:, r])
        both = out["pred_image"].unflatten(0, (3, 2))
        check_close(f"estimates at time {r}", both[:, r], single["pred_image"])


def test_in_the_warm_up_noise_stands_for_the_quantizers_error():
    tokenizer = learner()
    code_noise = 0.3 * torch.randn(3, 8, 8)
    out = tokenizer(IMAGES, S, code_noise=code_noise)
    f = F.normalize(tokenizer.encoder(IMAGES), dim=-1)
    z = groups_of(tokenizer, F.normalize(f + code_noise, dim=-1))
    group_z = tokenizer.diffusion.calls[0][2]
    check_close("z' of features with noise", group_z, torch.stack([z[0, 0], z[1, 2], z[2, 3]]))
    check_close("both losses of the quantizer", out["vq"] + out["commit"], 0.0)
    losses = out["vq"] + out["commit"]
    if losses.requires_grad:
        losses.backward()
    assert tokenizer.quantize.weight.grad is not None, "the codebook needs a gradient, of 0"


@torch.no_grad()
def test_times_are_uniform_and_noise_is_normal_if_none_are_given():
    tokenizer = learner()
    tokenizer(torch.zeros(500, 3, 8, 8))
    x_t, t, _ = tokenizer.diffusion.calls[0]
    s = dar.unshift_time(t, 3.0).sort().values
    check_close("500 times s, sorted", s, torch.linspace(0, 1, 500), 0.1)
    noise = x_t / (1 - t).view(-1, 1, 1, 1)
    check_close("mean of the noise", noise.mean(), 0.0, 0.05)
    check_close("spread of the noise", noise.std(), 1.0, 0.05)


def test_the_repa_heads_output_is_handed_on():
    tokenizer = learner(repa_layer=0)
    out = tokenizer(IMAGES, S)
    check_close("repa", out["repa"], tokenizer.diffusion.calls[0][2][:, :1])
    assert "repa" not in learner()(IMAGES, S), "there is a repa without a REPA head"


def loss_inputs():
    out = {
        "fm": torch.tensor(1.5),
        "vq": torch.tensor(0.25),
        "commit": torch.tensor(0.125),
        "pred_image": torch.randn(6, 3, 4, 4),  # two estimates for each of three images
        "repa": torch.randn(6, 5, 7),
    }
    return out, torch.randn(3, 3, 4, 4), torch.randn(3, 5, 7)


def test_the_loss_without_networks_has_three_terms():
    out, images, _ = loss_inputs()
    terms = dar.tokenizer_loss(out, images)
    check_equal("names", list(terms), ["fm", "vq", "commit"])
    check_close("their sum", sum(terms.values()), 1.875)


def test_lpips_compares_each_estimate_with_its_image():
    out, images, _ = loss_inputs()

    def distance(a, b):
        return (a - b).abs().mean((1, 2, 3))

    term = dar.tokenizer_loss(out, images, distance, 0.3)["lpips"]
    pairs = [(out["pred_image"][i] - images[i // 2]).abs().mean() for i in range(6)]
    check_close("lpips, weight 0.3", term, 0.3 * sum(pairs) / 6)


def test_repa_is_one_minus_the_cosine():
    out, images, target = loss_inputs()
    term = dar.tokenizer_loss(out, images, repa_target=target, repa_weight=0.7)["repa"]
    cosines = [F.cosine_similarity(out["repa"][i], target[i // 2], dim=-1) for i in range(6)]
    check_close("repa, weight 0.7", term, 0.7 * (1 - torch.stack(cosines).mean()))


def test_the_codebook_starts_from_different_features_of_length_one():
    vq = dar.VectorQuantizer(16, 8)
    f = 5 * torch.randn(100, 8)
    vq.start_from(f)
    rows = vq.embedding.weight.detach()
    check_close("lengths of the rows", rows.norm(dim=-1), torch.ones(16))
    chosen = (rows @ F.normalize(f, dim=-1).T).argmax(-1)
    check_close("every row is a feature", rows, F.normalize(f, dim=-1)[chosen])
    check_equal("no feature twice", len(set(chosen.tolist())), 16)
    assert chosen.tolist() != list(range(16)), "the first features, not random ones"


def test_the_average_of_the_weights_is_short_at_first():
    model = nn.Linear(2, 2)
    ema = nn.Linear(2, 2)
    for updates, share in ((0, 0.9), (90, 0.09), (10**6, 0.001)):
        nn.init.constant_(ema.weight, 0.0)
        nn.init.constant_(model.weight, 1.0)
        dar.update_ema(ema, model, updates)
        promise = f"after {updates} updates, the new weight's share"
        check_close(promise, ema.weight, torch.full((2, 2), share), 1e-5)
