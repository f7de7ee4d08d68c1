"""Chapter 4, the diffusion decoder: patches, time, and what a patch reads from a group's tokens."""

import pytest
import torch
from torch import nn

import dar

WIDTH = 64
TOKEN_WIDTH = 128
ROPE = dar.rope_2d(2, 3, 0, torch.device("cpu"))


@pytest.fixture
def fresh() -> dar.DiffusionDecoder:
    return dar.DiffusionDecoder(WIDTH, TOKEN_WIDTH, depth=3, patch_size=4, repa_layer=None)


@pytest.fixture
def decoder(fresh, random_weights) -> dar.DiffusionDecoder:
    return random_weights(fresh)


@pytest.fixture
def block(random_weights) -> dar.DiffusionBlock:
    return random_weights(dar.DiffusionBlock(WIDTH))


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t of 2x3 patches, t, and the z' of a group of 4 tokens, for two images."""
    return torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 4, TOKEN_WIDTH)


@pytest.fixture
def hidden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as a block sees it: x, t, and the tokens."""
    return torch.randn(2, 6, WIDTH), torch.rand(2), torch.randn(2, 4, WIDTH)


def inputs_of(module: nn.Module) -> list[torch.Tensor]:
    """A list that fills with what goes into the module."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    return seen


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Patches


def test_a_patch_holds_its_pixels_channel_by_channel(decoder, inputs):
    seen = inputs_of(decoder.patch_in)
    decoder(*inputs)
    x_t = inputs[0]
    for row in range(2):
        for column in range(3):
            pixels = x_t[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]  # [B, 3, 4, 4]
            assert torch.equal(seen[0][:, 3 * row + column], pixels.flatten(1))


def test_patches_return_to_where_they_came_from(decoder, inputs):
    seen = inputs_of(decoder.patch_in)
    decoder.patch_out.register_forward_hook(lambda *_: seen[0])
    assert torch.equal(decoder(*inputs)[0], inputs[0])


# Fresh weights


def test_the_first_velocity_is_zero(fresh, inputs):
    assert torch.equal(fresh(*inputs)[0], torch.zeros(2, 3, 8, 12))


def test_a_fresh_block_is_the_identity(fresh, hidden):
    for block in fresh.blocks:
        assert torch.equal(block(*hidden, ROPE), hidden[0])


# Time


def test_waves_have_lengths_from_short_to_long():
    t = torch.tensor([0.0, 0.123, 1.0])
    waves = dar.TimeEmbedding(768).waves(t)
    for i in (0, 1, 100, 383):
        angle = 1000 * t.double() * 10000 ** (-i / 384)
        torch.testing.assert_close(waves[:, i].double(), angle.cos(), rtol=0, atol=2e-4)
        torch.testing.assert_close(waves[:, 384 + i].double(), angle.sin(), rtol=0, atol=2e-4)


def test_one_time_serves_a_whole_batch(decoder, inputs):
    x_t, _, group_z = inputs
    one = decoder(x_t, torch.tensor([0.3]), group_z)[0]
    assert_close(one, decoder(x_t, torch.tensor([0.3, 0.3]), group_z)[0])
    assert not torch.allclose(one, decoder(x_t, torch.tensor([0.6]), group_z)[0], rtol=0.1)


# The group's tokens


def test_a_groups_tokens_are_a_set(decoder, inputs):
    x_t, t, group_z = inputs
    velocity = decoder(x_t, t, group_z)[0]
    assert_close(decoder(x_t, t, group_z[:, [3, 1, 0, 2]])[0], velocity)
    assert not torch.allclose(decoder(x_t, t, group_z[:, :2])[0], velocity, rtol=0.1)


def test_a_patch_reads_from_its_own_position(block, hidden):
    seen = inputs_of(block.cross_attn.proj)
    x, t, group_z = hidden
    alike = x[:, :1].expand(2, 6, WIDTH)
    block(alike, t, group_z, ROPE)
    reads = seen[0][0]  # [P, C]
    distance = torch.cdist(reads, reads) + torch.eye(6)
    assert distance.min() > 1e-3


def test_what_was_read_only_modulates(block, hidden):
    """With the two gates closed, a patch passes unchanged."""
    modulation = block.adaLN_modulation[1]
    with torch.no_grad():
        for gate in (2, 5):
            modulation.weight[gate * WIDTH : (gate + 1) * WIDTH] = 0
            modulation.bias[gate * WIDTH : (gate + 1) * WIDTH] = 0
    assert torch.equal(block(*hidden, ROPE), hidden[0])


# A block, in two halves


def test_the_condition_is_what_was_read_plus_the_time(block, hidden):
    seen = inputs_of(block.adaLN_modulation[1])
    block(*hidden, ROPE)
    x, t, group_z = hidden
    context = dar.layer_norm(block.cond_embed(group_z))
    m = block.cross_attn(dar.layer_norm(x), context, ROPE) + block.time_embed(t)[:, None]
    assert_close(seen[0], m * m.sigmoid())  # [B, P, C], one for each patch


def test_the_condition_shifts_scales_and_gates(block, hidden):
    shift1, scale1, gate1, shift2, scale2, gate2 = constants = torch.randn(6, WIDTH)
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.copy_(constants.flatten())
    x = hidden[0]
    y = x + gate1 * block.attention(shift1 + (1 + scale1) * dar.layer_norm(x), rope=ROPE)
    expected = y + gate2 * block.mlp(shift2 + (1 + scale2) * dar.layer_norm(y))
    assert_close(block(*hidden, ROPE), expected)


# REPA


def test_repa_reads_the_state_that_enters_its_block(random_weights, inputs):
    decoder = random_weights(dar.DiffusionDecoder(WIDTH, TOKEN_WIDTH, 3, 4, repa_layer=1))
    seen = inputs_of(decoder.blocks[1])
    velocity, features = decoder(*inputs, repa=True)
    assert features.shape == (2, 6, 768)
    assert_close(features, decoder.repa_head(seen[0]))
    without_head, nothing = decoder(*inputs)
    assert torch.equal(without_head, velocity)
    assert nothing is None


@pytest.mark.parametrize("height, width", [(32, 32), (16, 32), (48, 8), (16, 16), (4, 8)])
def test_repa_averages_a_grid_above_16(fresh, height, width):
    fresh.repa_head = nn.Identity()
    grid = torch.randn(2, height, width, WIDTH)
    rows = max(height // 16, 1)  # are averaged to one
    columns = max(width // 16, 1)
    expected = grid.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).mean((2, 4))
    features = fresh.read_repa(grid.flatten(1, 2), height, width)
    assert_close(features, expected.flatten(1, 2))
