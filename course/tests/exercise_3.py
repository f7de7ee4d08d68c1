"""Exercise 3: conditioning and AdaLN-zero."""

import math

import torch
from torch import Tensor

import dar
from course.tests.support import check_close, randomize

CPU = torch.device("cpu")
WIDTH = 64


def block_and_inputs():
    """A block; patches x [2, 6, C] of a 2x3 grid, times t [2], three tokens, and rotations."""
    block = randomize(dar.DiffusionBlock(WIDTH))
    x = torch.randn(2, 6, WIDTH)
    t = torch.rand(2)
    group_z = torch.randn(2, 3, WIDTH)
    return block, x, t, group_z, dar.rope_2d(2, 3, 0, CPU)


def set_modulation(block, constants: Tensor) -> None:
    """Makes shift, scale, gate for attention, then for the MLP, the rows of constants [6, C]."""
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.copy_(constants.flatten())


def inputs_of(module) -> list[Tensor]:
    """A list that fills with the first input of each call of the module."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach().clone()))
    return calls


def test_the_waves_are_cosines_and_then_sines():
    t = torch.tensor([0.0, 0.123, 1.0])
    waves = dar.TimeEmbedding(768).waves(t)
    assert waves.dtype == torch.float32, f"waves are {waves.dtype}"
    expected = torch.empty(3, 768)
    for b in range(3):
        for i in range(384):
            angle = 1000 * t[b].item() / 10000 ** (i / 384)
            expected[b, i] = math.cos(angle)
            expected[b, 384 + i] = math.sin(angle)
    check_close("three times, 768 numbers", waves, expected, 1e-3)


def test_the_waves_are_float32_for_times_of_lower_precision():
    t = torch.tensor([0.5], dtype=torch.bfloat16)
    waves = dar.TimeEmbedding(64).waves(t)
    assert waves.dtype == torch.float32, f"waves are {waves.dtype}"
    check_close("t = 1/2 in bfloat16", waves, dar.TimeEmbedding(64).waves(torch.tensor([0.5])))


def test_a_closed_gate_lets_nothing_through():
    block, x, t, group_z, rope = block_and_inputs()
    constants = torch.randn(6, WIDTH)
    constants[2] = 0
    constants[5] = 0
    set_modulation(block, constants)
    check_close("both gates 0", block(x, t, group_z, rope), x, 0)


def test_attention_is_shifted_scaled_and_gated():
    block, x, t, group_z, rope = block_and_inputs()
    constants = torch.randn(6, WIDTH)
    constants[5] = 0
    set_modulation(block, constants)
    shift, scale, gate = constants[:3]
    normed = dar.layer_norm(x)
    expected = x + gate * block.attention(normed + scale * normed + shift, rope=rope)
    check_close("the MLP's gate 0", block(x, t, group_z, rope), expected)


def test_the_mlp_is_shifted_scaled_and_gated():
    block, x, t, group_z, rope = block_and_inputs()
    constants = torch.randn(6, WIDTH)
    constants[2] = 0
    set_modulation(block, constants)
    shift, scale, gate = constants[3:]
    normed = dar.layer_norm(x)
    expected = x + gate * block.mlp(normed + scale * normed + shift)
    check_close("the attention's gate 0", block(x, t, group_z, rope), expected)


def test_the_mlp_sees_what_attention_has_added():
    block, x, t, group_z, rope = block_and_inputs()
    constants = torch.zeros(6, WIDTH)
    constants[2] = 1
    constants[5] = 1
    set_modulation(block, constants)
    y = x + block.attention(dar.layer_norm(x), rope=rope)
    expected = y + block.mlp(dar.layer_norm(y))
    check_close("both gates 1, no shift, no scale", block(x, t, group_z, rope), expected)


def test_the_condition_is_what_a_patch_reads_plus_the_time():
    block, x, t, group_z, rope = block_and_inputs()
    conditions = inputs_of(block.adaLN_modulation)
    block(x, t, group_z, rope)
    context = dar.layer_norm(block.cond_embed(group_z))
    read = block.cross_attn(dar.layer_norm(x), context=context, rope=rope)
    expected = torch.stack([read[b] + block.time_embed(t)[b] for b in range(2)])
    assert conditions, "adaLN_modulation was not called"
    check_close("m, a vector for each patch", conditions[0], expected)


def test_the_context_is_normalised():
    block, x, t, group_z, rope = block_and_inputs()
    before = block(x, t, group_z, rope)
    with torch.no_grad():  # what is normalised next may be twice as long
        block.cond_embed[2].weight.mul_(2)
        block.cond_embed[2].bias.mul_(2)
    check_close("cond_embed doubled", block(x, t, group_z, rope), before, 1e-3)


def test_a_patch_reads_from_its_own_place():
    block, _, t, group_z, rope = block_and_inputs()
    read = inputs_of(block.cross_attn.proj)
    same = torch.randn(1, 1, WIDTH).expand(2, 6, WIDTH)  # patches that differ in their place alone
    block(same, t, group_z, rope)
    differences = (read[0][:, 1:] - read[0][:, :1]).abs().amax(-1)
    assert (differences > 1e-4).all(), "equal patches read the same at different places: no rope?"


def test_one_time_serves_all_pictures():
    block, x, _, group_z, rope = block_and_inputs()
    one = block(x, torch.tensor([0.3]), group_z, rope)
    each = block(x, torch.tensor([0.3, 0.3]), group_z, rope)
    check_close("t [1] and t [2]", one, each)


def test_a_fresh_decoder_is_the_identity_and_its_velocity_zero():
    decoder = dar.DiffusionDecoder(WIDTH, 128, 2, 4, None)
    entering = inputs_of(decoder.blocks[0])
    leaving = inputs_of(decoder.patch_out)
    velocity, _ = decoder(torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 3, 128))
    check_close("what the blocks do", leaving[0], dar.layer_norm(entering[0]))
    check_close("the first velocity", velocity, torch.zeros(2, 3, 8, 12), 0)
