"""Chapter 4, the diffusion decoder: patches, time and condition, AdaLN-zero from cross-attention, the REPA head."""

import math

import pytest
import torch
from torch import nn

import dar

CPU = torch.device("cpu")
WIDTH, COND_WIDTH = 64, 128


def fresh(repa_layer: int | None = None, depth: int = 2, patch_size: int = 4) -> dar.DiffusionDecoder:
    return dar.DiffusionDecoder(WIDTH, COND_WIDTH, depth, patch_size, repa_layer)


def inputs(batch: int = 2, height: int = 8, width: int = 12, tokens: int = 3):
    """x_t [B, 3, H, W], t [B], condition [B, n, COND_WIDTH]."""
    return torch.randn(batch, 3, height, width), torch.rand(batch), torch.randn(batch, tokens, COND_WIDTH)


def captured_inputs(module: nn.Module) -> list:
    """A list that fills with the first input of each call of the module."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach().clone()))
    return calls


# Patches


def test_a_patch_holds_its_pixels_channel_by_channel_and_row_by_row():
    net, (x_t, t, condition) = fresh(), inputs()
    calls = captured_inputs(net.patch_in)
    net(x_t, t, condition)
    patches = calls[0]  # [B, P, 3·4·4]
    assert patches.shape == (2, 2 * 3, 48)
    for row in range(2):
        for column in range(3):
            pixels = x_t[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]  # [B, c, 4, 4]
            assert torch.equal(patches[:, 3 * row + column], pixels.flatten(1))


def test_the_output_puts_patches_back_where_they_came_from():
    net, (x_t, t, condition) = fresh(), inputs()
    calls = captured_inputs(net.patch_in)
    net.patch_out.register_forward_hook(lambda *_: calls[0])
    velocity, _ = net(x_t, t, condition)
    assert torch.equal(velocity, x_t)


# Zero at first


def test_the_first_velocity_is_zero():
    velocity, features = fresh()(*inputs())
    assert velocity.shape == (2, 3, 8, 12) and not velocity.any()
    assert features is None


def test_blocks_begin_as_the_identity():
    net, (x_t, t, condition) = fresh(), inputs()
    calls = captured_inputs(net.patch_in), captured_inputs(net.patch_out)
    net(x_t, t, condition)
    torch.testing.assert_close(calls[1][0], dar.layer_norm(net.patch_in(calls[0][0])))


def test_linears_start_with_standard_deviation_0_02_and_without_bias():
    for name, parameter in fresh(repa_layer=0).named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any() or "norm" in name, name
        elif "norm" not in name and "adaLN" not in name and "patch_out" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


# Time


def test_the_waves_are_sinusoids_of_1000_t_cosines_first():
    t = torch.tensor([0.0, 0.123, 1.0])
    out = dar.TimeEmbedding(768).waves(t)
    assert out.shape == (3, 768) and out.dtype == torch.float32
    for b in range(3):
        for i in (0, 1, 100, 383):
            angle = 1000 * t[b].item() * 10000 ** (-i / 384)
            assert out[b, i].item() == pytest.approx(math.cos(angle), abs=2e-4)  # float32 holds 1000 to 6e-5
            assert out[b, 384 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_the_time_mlp_is_linear_silu_linear(random_weights):
    embed, t = random_weights(dar.TimeEmbedding(WIDTH)), torch.rand(3)
    first, last = embed.mlp[0], embed.mlp[2]
    hidden = embed.waves(t) @ first.weight.T + first.bias
    torch.testing.assert_close(embed(t), (hidden * hidden.sigmoid()) @ last.weight.T + last.bias)


def test_one_time_serves_a_whole_batch(random_weights):
    net, (x_t, _, condition) = random_weights(fresh()), inputs()
    one, each = net(x_t, torch.tensor([0.3]), condition)[0], net(x_t, torch.tensor([0.3, 0.3]), condition)[0]
    torch.testing.assert_close(one, each)
    assert not torch.allclose(one, net(x_t, torch.tensor([0.6]), condition)[0], rtol=0.1)


def test_every_sample_has_its_own_time_and_condition(random_weights):
    net, (x_t, t, condition) = random_weights(fresh()), inputs(batch=3)
    together = net(x_t, t, condition)[0]
    for b in range(3):
        alone = net(x_t[b : b + 1], t[b : b + 1], condition[b : b + 1])[0]
        torch.testing.assert_close(alone[0], together[b], rtol=1e-4, atol=1e-4)


# Condition


def test_the_velocity_depends_on_the_condition_as_a_set_of_any_size(random_weights):
    net, (x_t, t, condition) = random_weights(fresh()), inputs(tokens=4)
    velocity = net(x_t, t, condition)[0]
    torch.testing.assert_close(net(x_t, t, condition[:, [3, 1, 0, 2]])[0], velocity, rtol=1e-4, atol=1e-4)
    for other in (condition[:, :2], torch.randn(2, 4, COND_WIDTH)):
        assert not torch.allclose(net(x_t, t, other)[0], velocity, rtol=0.1)


def test_the_condition_is_normalised_behind_both_of_its_linears(random_weights):
    net, (x_t, t, condition) = random_weights(fresh()), inputs()
    velocity = net(x_t, t, condition)[0]
    for linear in (net.cond_mlp, net.blocks[0].cond_embed[2], net.blocks[1].cond_embed[2]):
        with torch.no_grad():  # what is normalised next may be twice as long
            linear.weight.mul_(2)
            linear.bias.mul_(2)
        torch.testing.assert_close(net(x_t, t, condition)[0], velocity, rtol=1e-3, atol=1e-3)


def test_a_patch_reads_the_condition_from_its_own_place():
    block, rope = dar.DiffusionBlock(WIDTH), dar.rope_2d(2, 2, 0, CPU)
    reads = captured_inputs(block.cross_attn.proj)
    same = torch.randn(1, 1, WIDTH).expand(1, 4, WIDTH)  # equal patches differ in nothing but their place
    block(same, torch.rand(1), torch.randn(1, 3, WIDTH), rope)
    assert (reads[0][0, 1:] - reads[0][0, 0]).abs().amax(-1).gt(1e-3).all()


def test_a_patch_knows_its_row_and_its_column():
    net, (_, t, condition) = fresh(), inputs()
    reads = captured_inputs(net.blocks[0].cross_attn.proj)
    for height in (8, 12):  # 2x3 and 3x3 equal patches
        net(torch.full((2, 3, height, 12), 0.3), t, condition)
    torch.testing.assert_close(reads[0], reads[1][:, :6])


# The block


def test_the_modulation_is_made_from_what_a_patch_read_plus_the_time(random_weights):
    block, rope = random_weights(dar.DiffusionBlock(WIDTH)), dar.rope_2d(2, 3, 0, CPU)
    x, t, condition = torch.randn(2, 6, WIDTH), torch.rand(2), torch.randn(2, 3, WIDTH)
    calls = captured_inputs(block.adaLN_modulation[1])
    block(x, t, condition, rope)
    hidden = condition @ block.cond_embed[0].weight.T + block.cond_embed[0].bias
    context = dar.layer_norm((hidden * hidden.sigmoid()) @ block.cond_embed[2].weight.T + block.cond_embed[2].bias)
    summed = block.cross_attn(dar.layer_norm(x), context, rope) + block.time_embed(t)[:, None]
    torch.testing.assert_close(calls[0], summed * summed.sigmoid())  # [B, P, C]: one for each patch


def test_shift_scale_and_gate_come_in_order_first_for_attention_then_for_the_mlp(random_weights):
    block, rope = random_weights(dar.DiffusionBlock(WIDTH)), dar.rope_2d(2, 3, 0, CPU)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = constants = torch.randn(6, WIDTH)
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.copy_(constants.flatten())
    x = torch.randn(2, 6, WIDTH)
    y = x + gate_a * block.attention(dar.layer_norm(x) * (1 + scale_a) + shift_a, rope=rope)
    expected = y + gate_m * block.mlp(dar.layer_norm(y) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(block(x, torch.rand(2), torch.randn(2, 3, WIDTH), rope), expected, rtol=1e-4, atol=1e-4)


def test_with_closed_gates_nothing_that_was_read_reaches_the_patches(random_weights):
    block, rope = random_weights(dar.DiffusionBlock(WIDTH)), dar.rope_2d(2, 3, 0, CPU)
    gates = torch.zeros(6, WIDTH, dtype=torch.bool)
    gates[[2, 5]] = True
    with torch.no_grad():
        block.adaLN_modulation[1].weight[gates.flatten()] = 0
        block.adaLN_modulation[1].bias[gates.flatten()] = 0
    x = torch.randn(2, 6, WIDTH)
    assert torch.equal(block(x, torch.rand(2), torch.randn(2, 3, WIDTH), rope), x)


# REPA


def test_the_repa_head_reads_the_state_that_enters_its_block(random_weights):
    net, (x_t, t, condition) = random_weights(fresh(repa_layer=1, depth=3)), inputs()
    entering = [captured_inputs(block) for block in net.blocks]
    velocity, features = net(x_t, t, condition, repa=True)
    assert features.shape == (2, 6, 768)
    torch.testing.assert_close(features, net.repa_head(entering[1][0]))
    assert not torch.allclose(entering[1][0], entering[0][0], atol=0.1)
    assert [len(calls) for calls in entering] == [1, 1, 1]  # every block once, with or without
    plain, nothing = net(x_t, t, condition)
    torch.testing.assert_close(plain, velocity)
    assert nothing is None  # sampling does not pay for the head


@pytest.mark.parametrize("height, width", [(32, 32), (16, 32), (48, 16), (32, 8)])
def test_a_grid_above_16_is_averaged_to_16_for_repa(height, width):
    net = fresh(repa_layer=0)
    net.repa_head = nn.Identity()
    grid = torch.randn(2, height, width, WIDTH)
    rows, columns = max(height // 16, 1), max(width // 16, 1)
    expected = torch.zeros(2, min(height, 16), min(width, 16), WIDTH)
    for r in range(rows):
        for c in range(columns):
            expected += grid[:, r::rows, c::columns] / (rows * columns)
    features = net.read_repa(grid.flatten(1, 2), height, width)
    torch.testing.assert_close(features, expected.flatten(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(16, 16), (8, 8), (4, 16)])
def test_a_grid_up_to_16_is_kept_for_repa(height, width):
    net = fresh(repa_layer=0)
    net.repa_head = nn.Identity()
    x = torch.randn(2, height * width, WIDTH)
    assert torch.equal(net.read_repa(x, height, width), x)


# Precision and size


def test_the_velocity_is_float32_under_bfloat16_autocast(random_weights):
    net, (x_t, t, condition) = random_weights(fresh()), inputs()
    full = net(x_t, t, condition)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x_t, t, condition)[0]
    assert low.dtype == torch.float32
    assert (low - full).norm() < 0.05 * full.norm()


def test_parameter_counts_of_the_released_decoder_and_its_repa_head():
    with torch.device("meta"):
        with_head = dar.DiffusionDecoder(768, 768, depth=12, patch_size=8, repa_layer=8)
        without = dar.DiffusionDecoder(768, 768, depth=12, patch_size=8, repa_layer=None)
    assert sum(p.numel() for p in with_head.parameters()) == 192_474_560
    assert sum(p.numel() for p in without.parameters()) == 192_474_560 - 7_344_896  # the paper's 185M
