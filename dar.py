"""D-AR in one file: diffusion as next-token prediction (Gao & Shou, "D-AR: Diffusion via Autoregressive Models",
arXiv 2505.23660), in the order in which one would teach it.

A flow turns noise into an image in K steps. A tokenizer writes an image as N tokens in K groups, and step k of the flow
is told what to do by group k, which knows the groups before it. So the tokens stand in the order of the flow: the first
ones decide the layout, the last ones the detail. A plain Llama learns to write tokens from left to right. Whenever it
has finished a group, the picture can take its next step at once.

    chapter               what                                            where the paper has it
    1  Schedule and flow  condition_group, interpolate, solver_step       eq. 3, 4, 5, 8, Table 2
    2  Quantizer          VectorQuantizer                                 eq. 1, appendix I
    3  Attention          rope_1d, rope_2d, Attention, GatedBlock         section 4, appendix I
    4  Diffusion decoder  DiffusionBlock, DiffusionDecoder                eq. 2, Fig. 4
    5  Tokenizer          SequentialDiffusionTokenizer, tokenizer_loss    Fig. 4, eq. 7, Tables 1, 2, 6, 7
    6  Llama              ARTransformer, ar_loss                          eq. 6, section 4
    7  Generation         generate_groups, guidance_schedule              section 5, Table 4
    8  Streaming          stream                                          Fig. 1, section 3.3
       The lesson ends here; the rest is needed to run it.
    9  Checkpoints        load_tokenizer, load_ar, TOKENIZER_PRESETS      (the authors' released files, and ours)
    10 Shared tools       prepare_for_sampling, pictures, processes       (what sampling and metrics share)

Symbols, the paper's where it has them:
    x0, x1, x_t   noise; the image; the point between them at time t        t     flow time: 0 is noise, 1 the image
    v             velocity of the flow, x1 - x0                             s     uniform time, the paper's t'
    N, K          tokens of an image (256); groups of tokens (8)            k     a group, 0 ... K-1
    z, z'         a code vector; what the causal decoder makes of it        q,k,v in attention: queries, keys, values
    S, V          steps that draw a picture (K by default); codebook size (16384)
    B, C, P       in shapes: images in a batch; width of a model; patches of an image

Words that the paper takes as known:
    LPIPS         distance of two images in the features of a trained network (VGG-16); judges much as people do
    REPA          an extra loss: from a hidden state, predict a trained network's (DINOv2's) features
    AdaLN-zero    a condition shifts and scales a block's LayerNorms and gates what it adds; the gates start at zero
    guidance      classifier-free guidance, cfg: what the class changes in a model's answer, exaggerated (chapter 7)
    rFID          FID, a distance of two sets of images, between images and their reconstructions
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import logging
import math
import os
import re
import stat
import sys
import types
import typing
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn

HEAD_DIM = 64  # of every attention, in the tokenizer and in the Llama
EPS = 1e-6  # of every LayerNorm


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------
# 1. Schedule and flow
# Flow matching draws a straight line from noise x0 ~ N(0, I) to an image x1, and moves along it:
#     x_t = t x1 + (1 - t) x0            for t from 0 (noise) to 1 (image)                    eq. 3
#     v = d x_t / dt = x1 - x0           the velocity, the same everywhere on the line        eq. 4
# Many such lines pass through a point x_t. A network learns to predict v from x_t and t, and what it learns is their
# mean, which changes along the way. So a picture is drawn in several steps: start at noise, follow the predicted
# velocity a little, predict anew.
#
# D-AR's own idea is which tokens the network sees at which time. Time is cut into K parts. In part k the network sees
# the tokens of group k and no others. So group k must say what the flow needs to know in part k: early groups say where
# things are, since noise still hides the rest; late groups say what the details are.
#
# The parts are equal in a uniform time s, and t is a bent s:
#     t = s / (s + beta (1 - s))                                                              eq. 8
# With beta > 1 early flow times, where the layout is decided, get more than their share of parts, and so of tokens.
#
# Example with K = 4 and beta = 2. A picture drawn in four steps starts them at s = 0, 1/4, 1/2 and 3/4:
#     s                        0      0.125  0.25   0.375  0.5    0.625  0.75   0.875  1
#     t                        0      0.067  0.143  0.231  0.333  0.455  0.6    0.778  1
#     group, rule "ceil"       0      0      1      1      2      2      3      3      3
#     group, rule "nearest"    0      1      1      2      2      3      3      3      3


def shift_time(s: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 8: uniform time s in [0, 1] -> flow time t = s / (s + beta (1 - s)) in [0, 1]."""
    return s / (s + beta * (1 - s))


def unshift_time(t: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 5, the inverse: flow time t in [0, 1] -> s = t / (t + (1 - t) / beta)."""
    return t / (t + (1 - t) / beta)


def condition_group(s: Tensor | float, num_groups: int, rule: str = "ceil") -> Tensor | int:
    """Eq. 5: the group k that conditions the flow at uniform time s in [0, 1].
        "ceil":     k = min(floor(s K), K - 1)           each group owns one K-th of s
        "nearest":  k = min(floor(s K + 1/2), K - 1)     the released weights'; group 0 owns half a K-th
    The paper writes ceil(s K), counting groups from one. From zero, that is floor(s K) except at an edge s = i/K: the
    paper's group is that of the part of time that ends, but a step that starts there needs the part that begins.
    s: float tensor -> int64 tensor; number -> int."""
    if not isinstance(s, Tensor):
        return int(condition_group(torch.tensor(s, dtype=torch.float64, device="cpu"), num_groups, rule))
    require(rule in ("ceil", "nearest"), f"group rule {rule!r}: expected 'ceil' or 'nearest'")
    # floor(s K + 1/2) = (floor(2 s K) + 1) // 2
    k = floor_of_product(s, num_groups) if rule == "ceil" else (floor_of_product(s, 2 * num_groups) + 1) // 2
    return k.clamp(0, num_groups - 1)


def floor_of_product(s: Tensor, n: int) -> Tensor:
    """floor(s n) as int64, but safe against rounding ((1/49) · 49 < 1): the largest i with i/n <= s."""
    i = (s * n).floor()
    i = i + ((i + 1) / n <= s).to(i.dtype)
    return (i - (i / n > s).to(i.dtype)).long()


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Eq. 3: x_t = t x1 + (1 - t) x0, for noise x0 and images x1 [B, ...] at times t [B]."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def jump_estimate(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """Section 5.1: straight on from x_t to time 1, x1 = x_t + (1 - t) v. A preview is this. It costs no network call,
    since a sampling step has computed v. t: [B] or a number."""
    if isinstance(t, Tensor):
        t = t.view(-1, *[1] * (x_t.ndim - 1))
    return x_t + (1 - t) * velocity


def sampling_schedule(num_steps: int, num_groups: int, beta: float, rule: str) -> list[tuple[float, float, int]]:
    """Eq. 8: the S steps that draw a picture, each as (t at its start, t at its end, its group). Step i starts at i/S.
    With S = K, the paper's default, each group is used once; S < K skips groups, S > K reuses some."""
    require(num_steps >= 1, f"{num_steps} sampling steps: expected at least 1")
    t = [shift_time(i / num_steps, beta) for i in range(num_steps + 1)]
    return [(t[i], t[i + 1], condition_group(i / num_steps, num_groups, rule)) for i in range(num_steps)]


def solver_step(x: Tensor, v: Tensor, v_prev: Tensor | None, h: float, solver: str) -> Tensor:
    """One step of length h from x, where the velocity is v and was v_prev at the step before (None at the first).
        "euler":  x + h v
        "ab2":    x + h (3/2 v - 1/2 v_prev)     two-step Adams-Bashforth, "Adams 2nd" in Table 2; the first is Euler's
    For equal steps, this extrapolates v to the step's middle. Shifted steps are unequal; the paper ignores that."""
    require(solver in ("euler", "ab2"), f"solver {solver!r}: expected 'euler' or 'ab2'")
    if solver == "ab2" and v_prev is not None:
        v = 1.5 * v - 0.5 * v_prev
    return x + h * v


# ------------------------------------------------------------------------------
# 2. Quantizer
# An image becomes tokens in two steps. An encoder (chapter 5) turns the image and N learned vectors q_1 ... q_N, called
# queries, into N feature vectors f; the quantizer then replaces each f by the nearest of the V rows of a codebook. That
# row is z, its number is the token:
#     [z_1, ..., z_N] = quant(encoder(image, [q_1, ..., q_N]))                                eq. 1
# Features and rows have length one (appendix I). Then |f - z|^2 = 2 - 2 f·z, so the nearest row is the row with the
# largest inner product.
#
# Choosing a row has no gradient. So z passes its gradient on to f as if the two were equal ("straight through"), and
# two losses bring them together, where sg[] means "without gradient":
#     l_vq     = |sg[f] - z|^2           moves the codebook's rows to the features
#     l_commit = |f - sg[z]|^2           keeps the features near the rows; chapter 5 weighs it with 0.25


class VectorQuantizer(nn.Module):
    """A codebook of V directions of dimension D (eq. 1; appendix I, after LlamaGen), always in float32."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)  # N(0, 1): once normalised, uniform directions

    def codebook(self) -> Tensor:
        """The rows as they are compared and passed on: float32 [V, D], of length one."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Tokens int64 [...], 0 ... V-1 -> their rows, float32 [..., D], of length one."""
        return F.normalize(F.embedding(codes, self.embedding.weight).float(), dim=-1)

    @torch.no_grad()
    def nearest_code(self, f: Tensor) -> Tensor:
        """Features [..., D] -> tokens int64 [...]: for each the number of the nearest row."""
        with torch.autocast(f.device.type, enabled=False):
            flat, codebook = f.float().reshape(-1, f.shape[-1]), self.codebook()
            at_once = max(1, 2**26 // len(codebook))  # features, so that their products take at most 256 MB
            codes = [(part @ codebook.T).argmax(-1) for part in flat.split(at_once)]
        return torch.cat(codes).view(f.shape[:-1])

    def forward(self, f: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [B, N, D] -> (z [B, N, D], codes int64 [B, N], l_vq, l_commit).
        Both losses are means over D and over the tokens where keep (bool [B, N]) is true; they come without weights."""
        f = F.normalize(f.float(), dim=-1)
        codes = self.nearest_code(f)
        z = self.lookup(codes)
        keep = torch.ones_like(f[..., 0]) if keep is None else keep.to(f.dtype)
        vq = (((f.detach() - z) ** 2).mean(-1) * keep).sum() / keep.sum()
        commit = (((f - z.detach()) ** 2).mean(-1) * keep).sum() / keep.sum()
        return f + (z - f).detach(), codes, vq, commit  # the value is z's, and the gradient goes to f


# ------------------------------------------------------------------------------
# 3. Attention and blocks
# A token's query q is compared with the keys k of the tokens that it may attend to, and the result is a mean of their
# values v, weighted by how well the keys fit:
#     attend(q, k, v) = softmax(q k^T / sqrt(64)) v
# A rotary embedding (RoPE) tells attention where tokens are: each pair of numbers in a query or key is turned by an
# angle proportional to the token's place. The product of a turned query and a turned key then depends only on how far
# apart the two tokens are.


def rope_1d(place: Tensor) -> Tensor:
    """Places in a sequence, int64 [n] -> rotations float32 [n, 32, 2], the last dimension (cos, sin).
    Pair i of a head's 32 pairs turns by the angle place · 10000^(-i/32)."""
    frequency = 10000.0 ** (-torch.arange(32, device=place.device) / 32)
    angles = place[:, None] * frequency
    return torch.stack((angles.cos(), angles.sin()), -1)


def rope_2d(height: int, width: int, num_unplaced: int, device: torch.device) -> Tensor:
    """Rotations of a height x width grid of patches in row-major order, float32 [height·width + num_unplaced, 32, 2].
    The first 16 pairs of a head turn by the row, the last 16 by the column, pair i by that · 10000^(-i/16). The
    num_unplaced learned queries after the patches have no place: they get angle 0, as the first patch (appendix I)."""
    frequency = 10000.0 ** (-torch.arange(16, device=device) / 16)
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    angles = torch.cat((row[:, None] * frequency, column[:, None] * frequency), -1)  # [P, 32]
    angles = F.pad(angles, (0, 0, 0, num_unplaced))
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the pairs of neighbours in x [..., n, 64] by rope [n, 32, 2], in float32.
    A pair (a, b) becomes (a cos - b sin, a sin + b cos), which is the complex product (a + ib)(cos + i sin)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., n, 32]
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


def causal_mask(place: Tensor, length: int) -> Tensor:
    """bool [n, length]: may the token at place[i] (int64 [n]) attend to the one at place j? True for j <= place[i]."""
    return torch.arange(length, device=place.device) <= place[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(64)) v for queries [B, heads, n, 64], keys and values [B, heads, m, 64].
    mask: bool [n, m], true where a query may attend to a key; everywhere if None."""
    return attention_kernel(q, k, v, mask)  # torch's, or where there is a faster one, that (chapter 10)


class Attention(nn.Module):
    """The tokenizer's attention, of x to itself or to a context. Queries and keys pass a LayerNorm (appendix I)."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_DIM, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor, context=None, rope=None, mask=None) -> Tensor:
        """x [B, n, C] attends to itself, or to context [B, m, C]; -> [B, n, C].
        rope [n, 32, 2] turns queries and keys, but no context's keys, which have no place in the image."""
        source = x if context is None else context
        q = self.q_norm(self.q(x).unflatten(-1, (-1, HEAD_DIM))).transpose(1, 2)  # [B, heads, n, 64]
        k = self.k_norm(self.k(source).unflatten(-1, (-1, HEAD_DIM))).transpose(1, 2)  # [B, heads, m, 64]
        v = self.v(source).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope) if context is None else k
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may have left the norms in float32
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear - SiLU - Linear with a hidden width of 4 C."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class GatedBlock(nn.Module):
    """The block of encoder and causal decoder. Its learned gates start at zero, so a fresh block is the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = Attention(width), MLP(width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.gate1, self.gate2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))  # zero-initialised

    def forward(self, x: Tensor, rope=None, mask=None) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope=rope, mask=mask)
        return x + self.gate2 * self.mlp(self.norm2(x))


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def init_linears(module: nn.Module, std: float) -> None:
    """Truncated normal weights of standard deviation std and zero biases, in every Linear and convolution."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------
# 4. Diffusion decoder
# The network of the flow, D_FM in Fig. 4. It is trained to predict the velocity from the point x_t, the time t and
# c(t), the tokens of the group that chapter 1 assigns to this time, as vectors z' (chapter 5 makes them; here group_z):
#     l_fm = mean of |v - D_FM(x_t, t, c(t))|^2                                               eq. 2
# It is a diffusion transformer (DiT) on patches of pixels. In each block a condition m shifts, scales and gates what
# attention and MLP do: x + gate · f(shift + (1 + scale) · norm(x)), first with f = attention, then with f = MLP; shift,
# scale and gate are a Linear of m. In DiT m is one vector for the whole picture. Here every patch has its own: what
# this patch reads from the group's tokens by cross-attention, plus an embedding of the time. m only modulates x.


class TimeEmbedding(nn.Module):
    """Flow times t [B] in [0, 1] -> [B, C]: waves of many lengths, then Linear - SiLU - Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def waves(self, t: Tensor) -> Tensor:
        """cos, then sin of 1000 t · 10000^(-i / (C/2)), i < C/2: float32 [B, C]."""
        half = self.mlp[2].bias.numel() // 2  # C / 2
        angles = 1000 * t.float()[:, None] * 10000.0 ** (-torch.arange(half, device=t.device) / half)
        return torch.cat((angles.cos(), angles.sin()), -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.waves(t).to(self.mlp[0].weight.dtype))


class DiffusionBlock(nn.Module):
    """DiT's block (AdaLN-zero), modulated patch by patch (section 4, "Sequential diffusion tokenizer architecture")."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.cross_attn, self.mlp = Attention(width), Attention(width), MLP(width)
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, t: Tensor, group_z: Tensor, rope: Tensor) -> Tensor:
        """Patches x [B, P, C], t [B] or [1], the group's z', projected to [B, n, C], rope [P, 32, 2] -> [B, P, C]."""
        context = layer_norm(self.cond_embed(group_z))
        normal = layer_norm(x)
        m = self.cross_attn(normal, context=context, rope=rope) + self.time_embed(t)[:, None]  # [B, P, C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(m).chunk(6, -1)
        x = x + gate_a * self.attention(shift_a + (1 + scale_a) * normal, rope=rope)
        return x + gate_m * self.mlp(shift_m + (1 + scale_m) * layer_norm(x))


class DiffusionDecoder(nn.Module):
    """D_FM of eq. 2. For eq. 7, the hidden state that enters block repa_layer (unless None) also goes through the
    REPA head, a small network whose result the training compares to DINOv2's features."""

    REPA_GRID, REPA_WIDTH, REPA_HIDDEN = 16, 768, 2048  # DINOv2 ViT-B/14 sees 224 pixels: 16x16 features of width 768

    def __init__(self, width: int, token_width: int, depth: int, patch_size: int, repa_layer: int | None, std=0.02):
        super().__init__()
        self.patch_size, self.repa_layer = patch_size, repa_layer
        self.cond_mlp = nn.Linear(token_width, width)
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.patch_out = nn.Linear(width, 3 * patch_size**2)
        if repa_layer is not None:
            h, o = self.REPA_HIDDEN, self.REPA_WIDTH
            self.repa_head = nn.Sequential(nn.Linear(width, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, o))
        init_linears(self, std)
        nn.init.zeros_(self.patch_out.weight)  # zero-initialised: the first velocity is 0
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)  # zero-initialised: a fresh block is the identity

    def forward(self, x_t: Tensor, t: Tensor, group_z: Tensor, repa: bool = False) -> tuple[Tensor, Tensor | None]:
        """x_t [B, 3, H, W]; t [B], or [1] for all; group_z, the z' of a group of tokens, [B, n, token_width].
        -> velocity float32 [B, 3, H, W]; and with repa the REPA head's output [B, g·g, 768], g at most 16."""
        size, dtype = self.patch_size, self.patch_in.weight.dtype
        height, width = x_t.shape[2] // size, x_t.shape[3] // size
        rope = rope_2d(height, width, 0, x_t.device)
        group_z = layer_norm(self.cond_mlp(group_z))  # [B, n, C], for all blocks
        patches = F.pixel_unshuffle(x_t, size).flatten(2).transpose(1, 2)  # [B, P, 3·size²] in the order (c, row, col)
        x, repa_features = self.patch_in(patches.to(dtype)), None
        for i, block in enumerate(self.blocks):
            if repa and i == self.repa_layer:
                repa_features = self.read_repa(x, height, width)
            x = block(x, t, group_z, rope)
        out = self.patch_out(layer_norm(x)).float().transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(out, size), repa_features

    def read_repa(self, x: Tensor, height: int, width: int) -> Tensor:
        """Hidden state [B, height·width, C] -> [B, g·g, 768]: averaged to g = 16 where larger, else kept."""
        grid = x.transpose(1, 2).unflatten(2, (height, width))
        grid = F.adaptive_avg_pool2d(grid, (min(height, self.REPA_GRID), min(width, self.REPA_GRID)))
        return self.repa_head(grid.flatten(2).transpose(1, 2))


# ------------------------------------------------------------------------------
# 5. Tokenizer
# The parts of Fig. 4, with the sizes of the paper's model:
#     image [3, 256, 256]                                              noise x0 [3, 256, 256]
#       | cut into patches of 16x16 pixels                               | cut into patches of 8x8 pixels
#     256 patches and 256 learned queries                              1024 patches
#       | encoder                                                        |
#     256 features, one for each query                                   |
#       | quantizer (chapter 2)                                          |
#     256 tokens: what the Llama of chapter 6 learns to write            |
#       | causal decoder                                                 |
#     z', in 8 groups of 32  ------- group k, in part k of time ------>  | diffusion decoder (chapter 4), 8 steps
#                                                                      image
# Encoder. Patches and queries go through a transformer together. Query i reads all patches and the queries before it. A
# patch reads no query: otherwise query i could read in a patch, one block later, what a later query had put there, and
# the order of the tokens would be lost.
#
# Causal decoder. The diffusion decoder sees one group only, so that every step costs the same; but step k should also
# know what the earlier groups have said. So a causal transformer lets every token read the tokens before it, and z'
# brings along what they said. It must be causal: z' of group k has to be complete before group k + 1 exists.


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """All that shapes a tokenizer; the defaults are the paper's. Raises ValueError on what cannot be built."""

    image_size: int = 256  # pixels a side that decode() draws when it is given no noise
    encoder_patch: int = 16  # pixels a side
    encoder_width: int = 768
    encoder_layers: int = 8
    decoder_width: int = 768  # of the causal decoder, and so of z'
    decoder_layers: int = 8
    num_tokens: int = 256  # N
    num_groups: int = 8  # K
    codebook_size: int = 16384  # V
    code_dim: int = 8  # D
    diffusion_patch: int = 8  # pixels a side
    diffusion_width: int = 768
    diffusion_layers: int = 12
    num_steps: int = 0  # S, sampling steps; 0 means S = K
    time_shift: float = 2.0  # beta of eq. 5 and 8
    # x1 is data_scale · image; 1 in the paper's equations, 0.6 in its released weights. Noise keeps its size,
    # so it hides a fainter image for longer: more steps see only the layout.
    data_scale: float = 0.6
    group_rule: str = "ceil"  # of condition_group: "ceil" as in the paper, "nearest" as in the released weights
    repa_layer: int | None = 8  # REPA reads the state that enters this diffusion block; None: no REPA head
    commit_weight: float = 0.25  # of l_commit
    init_std: float = 0.02  # of fresh Linears; narrow models learn faster from a larger one, 1/sqrt(width)
    max_tokens: int = 1024  # rows of the tables of queries and positions, of which the first N are used

    def __post_init__(self):
        check_tokenizer_config(self)

    @property
    def group_size(self) -> int:
        """Tokens in a group, N / K."""
        return self.num_tokens // self.num_groups


class StreamStep(typing.NamedTuple):
    """A picture once a further group of tokens is known. Images are float32 [B, 3, H, W], not clamped."""

    codes: Tensor  # int64 [B, n], the tokens so far
    x: Tensor  # x_t / data_scale; after the last group this is the picture
    previews: tuple[Tensor, ...]  # a jump estimate for each sampling step so far

    @property
    def preview(self) -> Tensor:
        return self.previews[-1]  # never empty: the first step uses the first group


class SequentialDiffusionTokenizer(nn.Module):
    """Fig. 4: images to N tokens in the order of diffusion time, and back. A call returns what the losses need."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = c = config
        self.patchify = nn.Conv2d(3, c.encoder_width, c.encoder_patch, stride=c.encoder_patch)
        self.query_embedding = nn.Embedding(c.max_tokens, c.code_dim)  # a query is D numbers, widened by query_linear
        self.query_linear = nn.Linear(c.code_dim, c.encoder_width)
        self.encoder_layers = nn.ModuleList(GatedBlock(c.encoder_width) for _ in range(c.encoder_layers))
        self.quant_in = nn.Linear(c.encoder_width, c.code_dim, bias=False)
        self.quantize = VectorQuantizer(c.codebook_size, c.code_dim)
        self.quant_out = nn.Linear(c.code_dim, c.decoder_width, bias=False)
        self.decoder_embedding = nn.Embedding(c.max_tokens, c.decoder_width)  # learned positions
        self.decoder_layers = nn.ModuleList(GatedBlock(c.decoder_width) for _ in range(c.decoder_layers))
        init_linears(self, c.init_std)
        # Codes enter the causal decoder far above the positions; otherwise z' would ignore them for a long time.
        nn.init.normal_(self.quant_out.weight)
        nn.init.normal_(self.decoder_embedding.weight, std=0.02)
        self.diffusion = DiffusionDecoder(  # comes after init_linears, which would undo its zero-initialised layers
            c.diffusion_width, c.decoder_width, c.diffusion_layers, c.diffusion_patch, c.repa_layer, c.init_std
        )

    def encoder(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> features [B, N, D] of eq. 1, before the quantizer normalises them."""
        c = self.config
        check_pixels(images, "images", c.encoder_patch)
        patches = self.patchify(images.to(self.patchify.weight.dtype))  # [B, C, H/p, W/p]
        height, width = patches.shape[2:]
        patches = layer_norm(patches.flatten(2).transpose(1, 2))  # [B, P, C], row-major
        queries = self.query_linear(self.query_embedding.weight[: c.num_tokens]).to(patches.dtype)
        x = torch.cat((patches, queries.expand(len(images), -1, -1)), 1)  # [B, P+N, C]
        rope = rope_2d(height, width, c.num_tokens, x.device)
        mask = causal_mask(torch.arange(x.shape[1], device=x.device), x.shape[1])  # [P+N, P+N]
        mask[:, : height * width] = True  # all read all patches; this mask lets no patch read a query
        for block in self.encoder_layers:
            x = block(x, rope=rope, mask=mask)
        return self.quant_in(layer_norm(x[:, height * width :]))

    def causal_decoder(self, z: Tensor) -> Tensor:
        """Code vectors z [B, n, D] of the first n tokens -> z' [B, n, decoder_width]."""
        x = self.quant_out(z.to(self.quant_out.weight.dtype)) + self.decoder_embedding.weight[: z.shape[1]]
        mask = causal_mask(torch.arange(z.shape[1], device=z.device), z.shape[1])
        for block in self.decoder_layers:
            x = block(x, mask=mask)
        return layer_norm(x)

    def forward(self, images: Tensor, s=None, noise=None, code_noise=None) -> dict[str, Tensor]:
        """The training step of section 4: encode, quantize, draw a time, denoise with that time's group of z'.
        images: float [B, 3, H, W] in [-1, 1].
        s: uniform times [B, R], one drawn for each image if None. R > 1 is ours: one encoding serves several times.
        noise: x0 [B, R, 3, H, W], drawn if None.
        code_noise: [B, N, D], for a codebook warm-up (ours): added to the features instead of quantizing them.
            Fresh features are all alike and would share few codes.
        Returns what tokenizer_loss needs: "fm", l_fm of eq. 2 / data_scale²: the squared error of v / data_scale;
        "vq"; "commit", which is multiplied by commit_weight; "kept", of how many tokens both are means; "pred_image",
        jump estimates [B·R, 3, H, W], not clamped; "repa" [B·R, g·g, 768], with a REPA head; "codes" int64 [B, N]."""
        c, batch = self.config, len(images)
        s = (torch.rand(batch, device=images.device) if s is None else s).view(batch, -1)  # [B, R]
        group = condition_group(s, c.num_groups, c.group_rule)  # [B, R]

        # The tokens after the group in use (the last one of R) do not change this velocity. No picture error guides
        # them, and l_vq and l_commit alone would only tie them to rows that mean nothing: they leave them out.
        used = (group.amax(1, keepdim=True) + 1) * c.group_size  # [B, 1], tokens
        keep = torch.arange(c.num_tokens, device=images.device) < used  # [B, N]
        f = self.encoder(images)
        z, codes, vq, commit = self.quantize(f, keep)
        if code_noise is not None:
            z = F.normalize(F.normalize(f.float(), dim=-1) + code_noise, dim=-1)
            vq, commit = 0 * vq, 0 * commit  # not plain 0: DDP expects gradients (of 0) for the codebook

        groups = self.causal_decoder(z).unflatten(1, (c.num_groups, c.group_size))  # [B, K, N/K, C]
        image_number = torch.arange(batch, device=s.device)[:, None]  # [B, 1]
        group_z = groups[image_number, group].flatten(0, 1)  # [B·R, N/K, C]: for each time its group

        t = shift_time(s, c.time_shift).flatten()  # [B·R]
        x1 = (c.data_scale * images.float()).repeat_interleave(s.shape[1], 0)  # [B·R, 3, H, W]
        x0 = torch.randn_like(x1) if noise is None else noise.view(x1.shape)
        x_t = interpolate(x0, x1, t)
        v, repa_features = self.diffusion(x_t, t, group_z, repa=c.repa_layer is not None)
        out = {"fm": F.mse_loss(v, x1 - x0) / c.data_scale**2, "vq": vq, "commit": c.commit_weight * commit}
        out |= {"kept": keep.sum(), "codes": codes, "pred_image": jump_estimate(x_t, v, t) / c.data_scale}
        return out if repa_features is None else out | {"repa": repa_features}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in about [-1, 1], at most 2 (for decode()'s output) -> tokens, int64 [B, N]."""
        check_pixels(images, "images", self.config.encoder_patch, most=2)
        return self.quantize.nearest_code(self.encoder(images))

    def condition(self, codes: Tensor) -> Tensor:
        """Tokens int64 [B, n], n <= N -> z' [B, n, decoder_width]."""
        check_numbers("codes", codes, 2, self.config.codebook_size, self.config.num_tokens)
        return self.causal_decoder(self.quantize.lookup(codes))

    def velocity(self, x_t: Tensor, t: Tensor, group_z: Tensor) -> Tensor:
        """D_FM(x_t, t, a group's z') of eq. 2, float32 [B, 3, H, W]."""
        return self.diffusion(x_t, t, group_z)[0]

    @torch.no_grad()
    def denoise(
        self, code_groups: Iterable[Tensor], noise: Tensor, num_steps: int | None = None, solver: str = "ab2"
    ) -> Iterator[StreamStep]:
        """The sampler: takes each step of the flow as soon as the group of tokens that it needs is there.
        code_groups: up to K groups, int64 [B, N/K], in order; noise: x0 [B, 3, H, W]. Yields a StreamStep for each."""
        c = self.config
        check_pixels(noise, "noise", c.diffusion_patch)
        num_steps = (c.num_steps or c.num_groups) if num_steps is None else num_steps
        schedule = sampling_schedule(num_steps, c.num_groups, c.time_shift, c.group_rule)
        x, v_prev, previews, seen = noise.float(), None, (), None
        for k, codes in enumerate(code_groups):
            require(len(codes) == len(noise), f"noise for {len(noise)} pictures, codes for {len(codes)}")
            seen = codes if seen is None else torch.cat((seen, codes), 1)
            group_z = self.condition(seen)[:, -c.group_size :]  # z' of group k
            for t, t_next, group in schedule:
                if group == k:
                    v = self.velocity(x, x.new_full((1,), t), group_z)
                    previews += (jump_estimate(x, v, t) / c.data_scale,)
                    x = solver_step(x, v, v_prev, t_next - t, solver)
                    v_prev = v
            yield StreamStep(seen, x / c.data_scale, previews)

    def decode(self, codes: Tensor, noise: Tensor | None = None, num_steps=None, solver: str = "ab2") -> Tensor:
        """Tokens int64 [B, n] -> images, float32 [B, 3, H, W], about [-1, 1] and not clamped. noise: x0 [B, 3, H, W],
        which sets the size; drawn at config.image_size if None. num_steps: S. n < N tokens, in whole groups of N/K,
        give the preview after the last group (section 5.1, Table 5). Raises ValueError if something does not fit."""
        last = self._denoise_codes(codes, noise, num_steps, solver)
        return last.x if codes.shape[1] == self.config.num_tokens else last.preview

    def previews(self, codes: Tensor, noise: Tensor | None = None, num_steps=None, solver: str = "ab2") -> Tensor:
        """What decode() can show on its way (Fig. 5): a jump estimate for each step, in order, [steps, B, 3, H, W]."""
        return torch.stack(self._denoise_codes(codes, noise, num_steps, solver).previews)

    def _denoise_codes(self, codes: Tensor, noise: Tensor | None, num_steps: int | None, solver: str) -> StreamStep:
        c = self.config
        check_numbers("codes", codes, 2, c.codebook_size, c.num_tokens)
        whole = codes.numel() and codes.shape[1] % c.group_size == 0
        require(whole, f"codes {list(codes.shape)}: decoding takes whole groups of {c.group_size}, one image or more")
        if noise is None:
            noise = torch.randn(len(codes), 3, c.image_size, c.image_size, device=codes.device)
        *_, last = self.denoise(codes.split(c.group_size, 1), noise, num_steps, solver)
        return last


def tokenizer_loss(
    out: dict[str, Tensor], images: Tensor, lpips=None, lpips_weight=0.5, repa_target=None, repa_weight=0.5
) -> dict[str, Tensor]:
    """Eq. 7, the loss of the tokenizer, as its terms, each with its weight. The loss is their sum:
        l = l_fm / data_scale² + (l_vq + 0.25 l_commit) + 0.5 l_LPIPS + 0.5 l_repa
    l_fm alone gives blurred pictures: the mean of all details that would fit is smooth. l_LPIPS asks that the jump
    estimate looks like the image; l_repa, 1 - cosine of the REPA head's output and DINOv2's features, speeds learning.
    out: what the tokenizer returned for images [B, 3, H, W] in [-1, 1]. lpips: (images, images) -> their distances.
    repa_target: DINOv2's features of the images, [B, g·g, 768]. A term whose network is None is left out."""
    terms = {name: out[name] for name in ("fm", "vq", "commit")}
    times = len(out["pred_image"]) // len(images)  # R
    if lpips is not None:
        distance = lpips(out["pred_image"], images.repeat_interleave(times, 0))
        terms["lpips"] = lpips_weight * distance.mean()
    if repa_target is not None:
        cosine = F.cosine_similarity(out["repa"].float(), repa_target.float().repeat_interleave(times, 0), dim=-1)
        terms["repa"] = repa_weight * (1 - cosine.mean())
    return terms


# ------------------------------------------------------------------------------
# 6. Llama
# A decoder-only transformer as it is used for text: RMSNorm, SwiGLU, RoPE along the sequence. It is trained after the
# tokenizer, on the tokens that encode() makes of the images. In this chapter z_i is the number of token i. The Llama
# learns the probability of an image's tokens, each given the image's class y and the tokens before it:
#     p(z | y) = p(z_1 | y) p(z_2 | y, z_1) ... p(z_N | y, z_1, ..., z_{N-1})                 eq. 6
# Nothing in it knows about images. That is the point of D-AR: the order of the tokens is already right.
#     place                    0         1         2               N-1
#     input                    class y   z_1       z_2       ...   z_{N-1}
#     is to be predicted       z_1       z_2       z_3       ...   z_N


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """All that shapes a Llama. Raises ValueError, naming the value, on what cannot be built."""

    width: int = 768
    layers: int = 12
    vocab_size: int = 16384  # V, the tokenizer's codebook_size
    num_classes: int = 1000  # class number num_classes, one more, means "no class"
    num_tokens: int = 256  # N
    dropout: float = 0.1  # on embeddings, attention outputs and MLP outputs, in training

    def __post_init__(self):
        check_fields(self, may_be_zero=("dropout", "layers"))


class RMSNorm(nn.Module):
    """x / rms(x) · weight, where rms(x) = sqrt(mean(x²) + 1e-5); the quotient is computed in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class KVCache:
    """An attention layer's keys and values, float [B, heads, places, 64] each. Those of earlier tokens never change; so
    they are kept, and generation runs each token only once."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    def put(self, k: Tensor, v: Tensor, place: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, heads, n, 64] to the places int64 [n], and returns what is kept at the first `length` places.
        Places that were not written yet are hidden by attention's mask."""
        self.k.index_copy_(2, place, k.to(self.k.dtype))
        self.v.index_copy_(2, place, v.to(self.v.dtype))
        return self.k[:, :, :length], self.v[:, :, :length]


class LlamaAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values (rows in this order) and RoPE."""

    def __init__(self, width: int):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor, cache: KVCache | None = None, place=None) -> Tensor:
        """x [B, n, C], rope [n, 32, 2], mask bool [n, m] -> [B, n, C]. Without a cache m = n, and x attends to itself.
        With one, x stands at the places int64 [n], and attends to the first m places of the cache."""
        qkv = self.wqkv(x).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)  # [3, B, heads, n, 64]
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if cache is not None:
            k, v = cache.put(k, v, place, mask.shape[1])
        return self.wo(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with a hidden width of 8/3 C, rounded up to a multiple of 256."""

    def __init__(self, width: int):
        super().__init__()
        hidden = math.ceil((8 * width // 3) / 256) * 256
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.attention, self.feed_forward = LlamaAttention(width), SwiGLU(width)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor, cache: KVCache | None = None, place=None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache, place))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class ARTransformer(nn.Module):
    """p(z | y) of eq. 6. A loaded model may carry the `tokenizer` of its tokens, and `class_names`."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config = config
        self.attach_tokenizer(None)
        self.class_names: list[str] | None = None
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)  # the last row is "no class"
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaBlock(config.width, config.dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # zero-initialised: all tokens start equally likely, and the loss at log V

    def attach_tokenizer(self, tokenizer: SequentialDiffusionTokenizer | None) -> None:
        """Sets `tokenizer`. Raises ValueError, naming both values, if this model does not write its tokens."""
        if tokenizer is not None:
            check_same_tokens(self.config, tokenizer.config)
        object.__setattr__(self, "tokenizer", tokenizer)  # not a part of this module: its weights are its own

    def embed(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, n] -> embeddings [B, n, C]; with labels int64 [B], the class comes first: [B, 1 + n, C]."""
        x = self.tok_embeddings(codes)
        return x if labels is None else torch.cat((self.cls_embedding(labels)[:, None], x), 1)

    def run(self, x: Tensor, place: Tensor, length: int, caches: list[KVCache] | None = None) -> Tensor:
        """Embeddings [B, n, C], which stand at the places int64 [n], -> hidden states [B, n, C]. Each attends to all
        places up to its own; those that were run before are in the caches, of which the first `length` are read."""
        rope, mask = rope_1d(place), causal_mask(place, length)
        x = self.dropout(x)
        for i, block in enumerate(self.layers):
            x = block(x, rope, mask, caches[i] if caches else None, place)
        return self.norm(x)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Tokens int64 [B, n], n <= N, classes int64 [B] -> logits float32 [B, n+1, V]: at place i, of z_{i+1}."""
        x = self.embed(codes, labels)
        place = torch.arange(x.shape[1], device=x.device)
        return self.output(self.run(x, place, x.shape[1])).float()

    def next_logits(self, x: Tensor, place: Tensor, length: int, caches: list[KVCache]) -> Tensor:
        """Generation's step: embeddings [B, n, C] at the places int64 [n] -> logits float32 [B, V] of the token after
        the last. The caches hold the places before, and these n are added. n > 1 only for a class with a prefix."""
        return self.output(self.run(x, place, length, caches)[:, -1]).float()

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each layer. Zeros, since a hidden place has weight 0, but 0 · inf would be NaN."""
        heads, weight = self.config.width // HEAD_DIM, self.output.weight
        like = dict(device=weight.device, dtype=weight.dtype)
        return [KVCache(*torch.zeros(2, batch, heads, length, HEAD_DIM, **like)) for _ in self.layers]

    def generate(
        self, labels: Tensor, num_tokens: int | None = None, cfg=(1.1, 8.0), seeds=None, greedy=False, **more
    ) -> Tensor:
        """Draws tokens int64 [B, num_tokens] (default: N) for classes int64 [B]; call eval() first. Arguments (also
        prefix, temperature, top_k, top_p) and errors are those of generate_groups."""
        size = num_tokens or self.config.num_tokens  # one group: all the tokens
        return torch.cat(list(generate_groups(self, labels, size, num_tokens, cfg, seeds, greedy, **more)), 1)


def ar_loss(model: nn.Module, codes: Tensor, labels: Tensor, dropped=None, num_classes: int | None = None) -> Tensor:
    """Eq. 6 as a loss: the mean of -log p(z | y) / N, nats per token, for codes int64 [B, N] and labels int64 [B]. The
    model reads the class and all tokens but the last, and predicts all N. dropped: bool [B]; where it is true, "no
    class", number num_classes, is read instead. The recipe drops 10% of the classes at random, since guidance (chapter
    7) needs a model that can also do without one."""
    if dropped is not None:
        labels = labels.masked_fill(dropped, num_classes)
    logits = model(codes[:, :-1], labels)  # [B, N, V]
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


# ------------------------------------------------------------------------------
# 7. Generation
# Tokens are drawn from left to right, each from the distribution that the Llama gives it. Guidance makes pictures look
# more like their class, at the price of variety. The model is asked twice, with the class (logits c) and without
# (logits u), and the difference is exaggerated:
#     u + scale (c - u)                  scale 1: as it is; above 1: more of what the class changes
# In the paper the scale rises from the first token to the last. The first tokens decide the layout, and strong guidance
# would make all layouts alike; the last ones decide the details, and strong guidance makes these clean.
#
# All randomness of a picture comes from its own seed. So, but for rounding, a picture does not depend on the batch that
# it is drawn in, or on how many processes share the work.


def guidance_schedule(cfg: float | tuple[float, float] | None, num_tokens: int) -> list[float] | None:
    """The guidance scale of each token (Table 4): constant for a number, linear from the first to the last token for a
    pair (start, end). None if there is no guidance: cfg is None, or 1 throughout. Raises ValueError on another cfg."""
    start, end = cfg if isinstance(cfg, tuple | list) and len(cfg) == 2 else (cfg, cfg)
    if start is None and end is None:
        return None
    fits = is_number(start) and is_number(end)
    require(fits, f"guidance {cfg!r}: expected a number, a pair of numbers, or None")
    if start == end == 1:
        return None
    return [start + (end - start) * i / max(num_tokens - 1, 1) for i in range(num_tokens)]


def resolve_seeds(seeds: int | list[int] | None, count: int) -> list[int]:
    """A seed for each of count pictures: an int s means s, s+1, ...; None draws fresh ones. Raises ValueError."""
    if seeds is None:
        return torch.randint(2**31, (count,)).tolist()
    seeds = [int(seed) for seed in seeds] if hasattr(seeds, "__len__") else [int(seeds) + i for i in range(count)]
    fits = len(seeds) == count and all(0 <= seed < 2**31 for seed in seeds)
    require(fits, f"seeds {str(seeds):.40}: expected {count} of them, each 0 ... {2**31 - 1}")
    return seeds


def picture_generators(seeds: list[int], purpose: int, device: torch.device) -> list[torch.Generator]:
    """Each picture's random numbers: purpose 0 for its noise x0, 1 for its tokens, so that they are independent."""
    return [torch.Generator(device).manual_seed(2 * seed + purpose) for seed in seeds]


def initial_noise(seeds: list[int], size: int, device: torch.device) -> Tensor:
    """x0 of eq. 3, each picture's from its own seed: float32 [B, 3, size, size]."""
    generators = picture_generators(seeds, 0, device)
    return torch.stack([torch.randn(3, size, size, device=device, generator=g) for g in generators])


def gumbel_noise(seeds: list[int], vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """The noise that draws a token, float32 [B, V], for one token after another, each picture's from its own seed. To
    add Gumbel noise to logits and take the largest is to draw from softmax(logits); and -log of an exponentially
    distributed number is Gumbel noise. It is drawn for 32 tokens at a time."""
    generators = picture_generators(seeds, 1, device)
    exponential = torch.empty(len(seeds), 32, vocab_size, device=device)
    while True:
        for picture, generator in zip(exponential, generators):
            picture.exponential_(generator=generator)
        yield from -exponential.clamp_min(1e-38).log().transpose(0, 1)  # some devices draw exact zeros


def guide(logits: Tensor, scale: float) -> Tensor:
    """logits [2 B, V], the pictures with their class and then the same without -> guided logits [B, V]."""
    with_class, without = logits.chunk(2)
    return without + scale * (with_class - without)


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits [B, V] / temperature; then -inf for all but the top_k likeliest tokens (0: all stay); then -inf for all
    but the likeliest tokens that together reach the probability top_p (1: all stay)."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered = logits.sort(descending=True).values
        probability = ordered.softmax(-1)
        likelier = probability.cumsum(-1) - probability  # what the tokens before have together; 0 for the first
        stays = likelier < top_p
        smallest = ordered.masked_fill(~stays, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


@torch.no_grad()
def generate_groups(
    ar, labels, group_size, num_tokens=None, cfg=(1.1, 8.0), seeds=None, greedy=False, prefix=None, **filters
) -> Iterator[Tensor]:
    """Draws num_tokens (default: N) tokens for classes int64 [B], and yields int64 [B, group_size] whenever a group is
    full. cfg: see guidance_schedule. seeds: see resolve_seeds. greedy: take the likeliest token. prefix: tokens int64
    [n] or [B, n] to keep as they are (section 5.1, zero-shot control). filters: of filter_logits. Raises ValueError."""
    count = ar.config.num_tokens if num_tokens is None else num_tokens
    prefix = check_generation(ar.config, labels, count, prefix, **filters)  # [B, n]
    scales = guidance_schedule(cfg, count)
    copies = 1 if scales is None else 2  # of each picture: with its class, and without it for guidance
    classes = torch.cat((labels, torch.full_like(labels, ar.config.num_classes)))[: copies * len(labels)]
    if greedy:
        noise, filters = itertools.repeat(0.0), {}  # the likeliest token is the likeliest after any filter
    else:
        noise = gumbel_noise(resolve_seeds(seeds, len(labels)), ar.config.vocab_size, labels.device)

    codes = prefix
    caches = ar.new_caches(len(classes), count)
    x = ar.embed(codes.repeat(copies, 1), classes)  # [copies · B, 1 + n, C]: class and prefix are read at once
    place = torch.arange(x.shape[1], device=labels.device)
    for i, gumbel in zip(range(count), noise):  # noise i belongs to token i, also when token i is given
        if i >= prefix.shape[1]:
            length = min(64 * (i // 64 + 1), count)  # all places so far, rounded up: few shapes for torch.compile
            logits = ar.next_logits(x, place, length, caches)  # [copies · B, V]
            if scales is not None:
                logits = guide(logits, scales[i])
            code = (filter_logits(logits, **filters) + gumbel).argmax(-1, keepdim=True)  # [B, 1]
            codes = torch.cat((codes, code), 1)
            x, place = ar.embed(code.repeat(copies, 1)), place[-1:] + 1  # what is read next: this one token
        if (i + 1) % group_size == 0 or i + 1 == count:
            yield codes[:, i - i % group_size : i + 1]


# ------------------------------------------------------------------------------
# 8. Streaming
# Fig. 1: while the Llama writes, each finished group of tokens takes the picture one step on, and the velocity of that
# step gives a preview for nothing.
#
# The first tokens carry the layout. So a class takes over another picture's layout (Fig. 6; ar, tokenizer: chapter 9):
#     prefix = tokenizer.encode(image)[:, :32]             # image [1, 3, 256, 256] -> [1, 32], the first group
#     for step in stream(ar, tokenizer, labels=torch.tensor([207]), prefix=prefix):
#         show(step.preview)
# An eighth to a half of the tokens is worth trying: the fewer are kept, the more is left to the class.


def stream(
    ar, tokenizer, labels: Tensor, cfg=(1.1, 8.0), seeds=None, noise=None, num_steps=None, solver="ab2", **sampling
) -> Iterator[StreamStep]:
    """Section 3.3: yields a StreamStep after each group of N/K tokens. The last one's x is the finished picture, the
    same as decode(codes, noise). noise: x0, from each picture's seed if None. num_steps and solver are
    decode()'s; labels, cfg, seeds and the rest (greedy, prefix, temperature, top_k, top_p) generate_groups'."""
    check_same_tokens(ar.config, tokenizer.config)
    seeds = resolve_seeds(seeds, len(labels))
    if noise is None:
        noise = initial_noise(seeds, tokenizer.config.image_size, labels.device)
    groups = generate_groups(ar, labels, tokenizer.config.group_size, cfg=cfg, seeds=seeds, **sampling)
    return tokenizer.denoise(groups, noise, num_steps, solver)


# ------------------------------------------------------------------------------
# 9. Checkpoints
# Ours are plain dicts and tensors: {"format", "kind", "config", "model"} and perhaps "ema" (averaged weights, which
# loading prefers), "class_names", "tokenizer" (inside a Llama's) and "training" (what resuming needs). The authors' are
# renamed key by key. Either way a file is data: nothing in it can run.

FORMAT = "dar-1"


@contextlib.contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Puts the file's name before an error's message, and makes that one line."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        message = "".join(c if c.isprintable() else "?" for c in str(error))
        raise type(error)(f"{path}: {message}") from None


def read_checkpoint(path: str | Path) -> dict:
    """A .pt file as a dict, its tensors mapped, not read. Raises OSError, or ValueError: damaged, or holding code."""
    open(path, "rb").close()
    inert = types.SimpleNamespace  # does nothing; for classes that the released files name
    stand_ins = torch.serialization.safe_globals([(inert, "argparse.Namespace"), (inert, "config_util.Config")])
    with about(path), stand_ins, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on odd pickles
        try:
            with zipfile.ZipFile(path) as file:  # what torch.load takes on trust
                for entry in file.infolist():
                    require(entry.compress_type == zipfile.ZIP_STORED, "tensors are read where they lie, uncompressed")
                    with file.open(entry) as opened:  # compares names; and reading to the end, the checksum
                        opened.read(-1 if entry.filename.endswith("data.pkl") else 0)
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file can fail in any way there is
            found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
            if found and "weights_only" in str(error):
                raise ValueError(f"refused: it holds {found[1]}, which could run code") from None
            hint = "copy it again; a file of an old torch: torch.load and torch.save it there"
            raise ValueError(f"damaged, or not in torch's zip format ({hint})") from None
        require(isinstance(data, dict), f"holds a {type(data).__name__}, expected a checkpoint's dict")
    return data


def save_checkpoint(path, model: nn.Module, ema=None, training: dict | None = None, dtype=None, before=None) -> None:
    """Writes a tokenizer, or a Llama with its tokenizer and class names, weights in dtype. ema: the model of averaged
    weights. training: plain data for resuming."""

    def as_dict(of: nn.Module) -> dict:
        kind = "ar" if isinstance(of, ARTransformer) else "tokenizer"
        weights = {name: value.detach().to("cpu", dtype) for name, value in of.state_dict().items()}
        return {"format": FORMAT, "kind": kind, "config": dataclasses.asdict(of.config), "model": weights}

    tokenizer, names = getattr(model, "tokenizer", None), getattr(model, "class_names", None)
    more = {"tokenizer": tokenizer and as_dict(tokenizer), "class_names": names and list(names), "training": training}
    more |= {"ema": ema and as_dict(ema)["model"]}
    data = as_dict(model) | {name: value for name, value in more.items() if value is not None}
    write_atomically(path, lambda file: torch.save(data, file), before)


def write_atomically(path: str | Path, write: Callable, before: Path | None = None) -> None:
    """Calls write(file) on PATH.tmp, flushes it to the disk and renames it to path, which appears whole or not at all.
    What was there is renamed to `before`, if given. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path}: cannot be written ({reason}); nothing was replaced") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_tokenizer(path, device="cpu", dtype=None, data: dict | None = None) -> SequentialDiffusionTokenizer:
    """A tokenizer from our format or the authors', in eval mode. data: the file's content, if it was read. Raises
    OSError, ValueError or FloatingPointError (not finite), naming the file."""
    data = read_checkpoint(path) if data is None else data
    with about(path):
        config, state = recognise(data, TokenizerConfig, "a tokenizer", "patchify.weight")
        config = config or released_config(data.get("config"), state)
        return assign_weights(SequentialDiffusionTokenizer, config, state, device, dtype)


def load_ar(path, device="cpu", dtype=None, tokenizer=None, num_tokens: int | None = None) -> ARTransformer:
    """A Llama, likewise. tokenizer: instead of the file's. num_tokens: N, where no file tells it (default: 256)."""
    data = read_checkpoint(path)
    with about(path):
        if tokenizer is None and "format" in data and isinstance(data.get("tokenizer"), dict):
            tokenizer = load_tokenizer("its tokenizer", device, dtype, data["tokenizer"])
        config, state = recognise(data, ARConfig, "a Llama", "tok_embeddings.weight")
        if config is None:  # a released file
            codes, width = shape_of(state, "tok_embeddings.weight", 2)
            classes, _ = shape_of(state, "cls_embedding.weight", 2)
            n = tokenizer.config.num_tokens if tokenizer else num_tokens or 256
            config = ARConfig(width, depth_of(state, "layers."), codes, classes - 1, n)
        ar = assign_weights(ARTransformer, config, state, device, dtype)
        ar.class_names = names = data.get("class_names")
        fits = isinstance(names, list) and {type(n) for n in names} == {str} and len(names) == config.num_classes
        require(names is None or fits, f"class_names is no list of {config.num_classes} names")
        ar.attach_tokenizer(tokenizer)
    return ar


RELEASED_NAMES = {  # in a name of the authors' files, or of a file that DDP or torch.compile left -> ours
    r"^((module|_orig_mod)\.)+": "",
    r"^quant_(in|out)_conv\.": r"quant_\1.",
    r"^diff_decoder\.net\.": "diffusion.",
    r"\.conv_(in|out)\.": r".patch_\1.",
    r"\.repa_out\.": ".repa_head.",
    r"\.embedding_table\.": ".",
}
RELEASED_SETTINGS = dict(num_all_queries="num_tokens", num_query_groups="num_groups")  # in their config -> ours
RELEASED_SETTINGS |= dict(num_denoising_steps="num_steps", time_shift="time_shift", data_std="data_scale")


def recognise(data: dict, config_class, kind: str, key: str) -> tuple[typing.Any, dict]:
    """(config, or None for a released file; state dict under our names)."""
    found = next(part for part in (data.get("ema"), data.get("model"), data) if isinstance(part, dict))
    state = {}
    for name, value in found.items():
        for pattern, ours in RELEASED_NAMES.items():
            name = re.sub(pattern, ours, str(name))
        if name.startswith(("quant_", "diffusion.patch_")) and isinstance(value, Tensor) and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # released 1x1 convolutions are our Linears
        state[name] = value
    state.pop("quantize.codebook_used", None)  # the authors' count of used codes, no weight
    require(key in state, f"expected {kind}, but it has no {key}")
    if "format" not in data:
        return None, state
    require(data["format"] == FORMAT, f"format {data['format']!r:.40}, expected {FORMAT!r}; a newer dar.py wrote it")
    try:
        return config_class(**data["config"]), state
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"unusable config ({error})") from None


def shape_of(state: dict, name: str, dims: int) -> tuple[int, ...]:
    shape = tuple(getattr(state.get(name), "shape", ()))
    require(len(shape) == dims, f"{name} is missing or no tensor of {dims} dimensions")
    return shape


def depth_of(state: dict, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def released_config(config, state: dict) -> TokenizerConfig:
    """Sizes from the weights' shapes; N, K, S, data scale and beta from the file's config, otherwise v1's."""
    if isinstance(config, types.SimpleNamespace):
        config = vars(config).get("_data")  # of the stand-in for their Config
    config = {} if config is None else config.get("model", config) if isinstance(config, dict) else config
    diffusion = config.get("diff_decoder", {}) if isinstance(config, dict) else None
    require(isinstance(diffusion, dict), "its config is no dict of settings")
    says = diffusion | config
    fields = {ours: says[theirs] for theirs, ours in RELEASED_SETTINGS.items() if theirs in says}
    fields["encoder_width"], _, fields["encoder_patch"], _ = shape_of(state, "patchify.weight", 4)
    fields["codebook_size"], fields["code_dim"] = shape_of(state, "quantize.embedding.weight", 2)
    fields["max_tokens"], fields["decoder_width"] = shape_of(state, "decoder_embedding.weight", 2)
    fields["diffusion_width"], pixels = shape_of(state, "diffusion.patch_in.weight", 2)
    fields["diffusion_patch"] = math.isqrt(pixels // 3)
    depths = (depth_of(state, prefix) for prefix in ("encoder_layers.", "decoder_layers.", "diffusion.blocks."))
    fields["encoder_layers"], fields["decoder_layers"], fields["diffusion_layers"] = depth = tuple(depths)
    has_head = "diffusion.repa_head.0.weight" in state
    fields["repa_layer"] = says.get("repa_layer", min(8, depth[2] - 1)) if has_head else None
    return TokenizerConfig(group_rule="nearest", **fields)


def assign_weights(model_class, config, state: dict, device, dtype) -> nn.Module:
    """Builds the model without memory, lets torch check every key and shape, then copies the tensors."""
    for name, value in state.items():
        floats = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        whole = floats and not value.is_meta and value.untyped_storage().nbytes() >= value.nbytes
        require(whole, f"{name} is no dense tensor of floats that are in the file")
    try:
        with torch.device("meta"):
            model = model_class(config)
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the model: {' '.join(str(error).split())[:1500]}") from None
    model.load_state_dict({name: value.to(device, dtype, copy=True) for name, value in state.items()}, assign=True)
    for name, value in model.state_dict().items():
        if not torch.stack(torch.aminmax(value.float() if value.itemsize == 1 else value)).isfinite().all():
            raise FloatingPointError(f"{name} is not finite, as after a failed training")
    return model.eval()


def is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_fields(config, may_be_zero: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        name, value, limit = field.name, getattr(config, field.name), 1000 if "layers" in field.name else 2**31
        if field.type is str or (value is None and field.type == int | None):
            continue
        kind, least = "number" if field.type is float else "integer", "0" if name in may_be_zero else "above 0"
        fits = is_number(value) if kind == "number" else type(value) is int
        fits = fits and 0 <= value < limit and (value > 0 or name in may_be_zero)
        require(fits, f"{name} = {value!r}: expected {kind}, {least} to {limit}")
        wanted = f"{name} = {value}: expected a multiple of {HEAD_DIM}, the width of a head"
        require(not name.endswith("width") or value % HEAD_DIM == 0, wanted)


def check_tokenizer_config(c: TokenizerConfig) -> None:
    check_fields(c, ("num_steps", "repa_layer", "commit_weight", "encoder_layers", "decoder_layers"))
    for name, patch in ("encoder_patch", c.encoder_patch), ("diffusion_patch", c.diffusion_patch):
        require(c.image_size % patch == 0, f"image size {c.image_size} is no multiple of {name} = {patch}")
    n, k, rows, depth = c.num_tokens, c.num_groups, c.max_tokens, c.diffusion_layers
    require(n % k == 0, f"N = {n} tokens do not divide into K = {k} equal groups")
    require(n <= rows, f"N = {n} tokens, but the tables have max_tokens = {rows} rows")
    require((c.repa_layer or 0) < depth, f"repa_layer = {c.repa_layer} must be below diffusion_layers = {depth}")
    require(c.group_rule in ("ceil", "nearest"), f"group_rule = {c.group_rule!r}: expected 'ceil' or 'nearest'")


def check_same_tokens(ar: ARConfig, tokenizer: TokenizerConfig) -> None:
    a, b = (ar.vocab_size, ar.num_tokens), (tokenizer.codebook_size, tokenizer.num_tokens)
    require(a == b, f"{a[0]} codes and {a[1]} tokens, the tokenizer {b[0]} and {b[1]}: they do not belong together")


def check_numbers(what: str, numbers: Tensor, dims: int, count: int, most: int = 2**31) -> None:
    fits = numbers.dtype == torch.int64 and numbers.ndim == dims and numbers.shape[-1] <= most
    wanted = f"torch.int64, {dims}-dimensional" + (f", at most {most} in a row" if most < 2**31 else "")
    require(fits, f"{what}: {numbers.dtype} {list(numbers.shape)}, expected {wanted}")
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 0)
    require(0 <= low and high < count, f"{what} from {low} to {high}: expected 0 ... {count - 1}")


def check_pixels(images: Tensor, what: str, patch: int, most: float = math.inf) -> None:
    *_, channels, height, width = (0, 0, 0, *images.shape)
    fits = images.ndim == 4 and channels == 3 and height * width and height % patch == width % patch == 0
    require(fits, f"{what} {list(images.shape)}: expected [B, 3, H, W], with multiples of the patch size {patch}")
    look = most < math.inf and images.numel() and not torch.compiler.is_compiling()
    top = images.float().abs().max().item() if look else 0
    wanted = f"{images.dtype} up to {top:.4g}, expected floats in [-1, 1]; uint8 needs dar.to_float"
    require(images.is_floating_point() and top <= most, f"{what}: {wanted}")


def check_generation(c: ARConfig, labels, count, prefix, temperature=1.0, top_k=0, top_p=1.0) -> Tensor:
    """-> the prefix, int64 [B, n], n = 0 without one."""
    require(1 <= count <= c.num_tokens, f"num_tokens = {count}: the model draws 1 ... {c.num_tokens}")
    check_numbers("class labels", labels, 1, c.num_classes + 1)
    found = f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
    require(temperature > 0 and top_k >= 0 and 0 < top_p <= 1, f"{found}: expected > 0, >= 0, and in (0, 1]")
    prefix = labels.new_empty(0) if prefix is None else prefix.to(labels.device)
    prefix = prefix.expand(len(labels), -1) if prefix.ndim == 1 or prefix.ndim == 2 and len(prefix) == 1 else prefix
    check_numbers("prefix tokens", prefix, 2, c.vocab_size, count)
    require(len(prefix) == len(labels), f"prefix for {len(prefix)} pictures, labels for {len(labels)}")
    return prefix


LITE = dict(encoder_width=512, decoder_width=512, diffusion_width=512, diffusion_layers=8, repa_layer=5)
TINY = dict(image_size=32, encoder_patch=4, diffusion_patch=4, num_tokens=64, codebook_size=1024, repa_layer=None)
TINY |= dict(encoder_width=128, decoder_width=128, diffusion_width=128, init_std=0.08)
TINY |= dict(encoder_layers=4, decoder_layers=4, diffusion_layers=6)
SHAPES = dict(image_size=16, num_tokens=16, num_groups=4, codebook_size=64, time_shift=4.0, init_std=0.125)
SHAPES |= dict(encoder_width=64, decoder_width=64, diffusion_width=64, encoder_layers=2, diffusion_layers=2)
TOKENIZER_PRESETS = {
    "v1": TokenizerConfig(),  # 307M parameters; 1.52 rFID in Table 2
    "lite": TokenizerConfig(**LITE),  # 113M, of the ablations in appendix III
    "tiny": TokenizerConfig(**TINY),  # 32x32 pixels, 4M, trains on two CPU cores
    "shapes": TokenizerConfig(**TINY | SHAPES, data_scale=1.0),  # 16x16, 0.6M, for a first training
    "cifar10": TokenizerConfig(**TINY, time_shift=8.0),  # of the shipped model
}
AR_PRESETS = {
    "B": ARConfig(768, 12),  # 111M parameters
    "L": ARConfig(1024, 24),  # 343M, D-AR-L
    "XL": ARConfig(1280, 36),  # 775M, D-AR-XL: 2.09 FID in Table 3
    "tiny": ARConfig(192, 6, vocab_size=1024, num_classes=10, num_tokens=64),  # for the "tiny" tokenizer
    "shapes": ARConfig(128, 3, vocab_size=64, num_classes=4, num_tokens=16),  # for the "shapes" tokenizer
    "cifar10": ARConfig(256, 5, vocab_size=1024, num_classes=10, num_tokens=64),  # of the shipped model
}


# ------------------------------------------------------------------------------
# 10. Shared tools
# What sampling, metrics and trainings share: speed (same results but for rounding), processes, pictures.

HAS_AMX = torch.cpu._is_amx_tile_supported()  # processors with units for products of bfloat16
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # large profiles do not make a PNG corrupt


def prepare_for_sampling(model: nn.Module, compile: bool = False) -> nn.Module:
    """Makes a loaded model, and the tokenizer that it carries, fast: in place, for use only. On a CPU Linears are
    packed. compile: for many pictures on a GPU; a step of the Llama, or of the flow, becomes one CUDA graph."""
    if getattr(model, "tokenizer", None) is not None:
        prepare_for_sampling(model.tokenizer, compile)
    keep_freed_memory()
    options = dict(mode="reduce-overhead", fullgraph=True, dynamic=False)
    if not compile:
        pack_linears(model)
    elif isinstance(model, ARTransformer) and "next_logits" not in vars(model):  # once
        model.new_caches = KeptCaches(model.new_caches)
        plain, fast = model.next_logits, quiet_compile(model.next_logits, **options)
        model.next_logits = lambda x, *more: (fast if x.shape[1] == 1 else plain)(x, *more)  # a prefix is read once
    elif isinstance(model, SequentialDiffusionTokenizer) and "velocity" not in vars(model):  # once
        step = quiet_compile(model.velocity, **options)  # one serves all groups, if their tokens are contiguous
        model.velocity = lambda x, t, tokens: step(x, t, tokens.contiguous()).clone()  # the next writes over its result
    return model


def quiet_compile(function: Callable, **options) -> Callable:
    """torch.compile, with fewer remarks and for many batch sizes."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # remarks that there is no GPU
    torch._dynamo.config.recompile_limit = 256
    torch._inductor.config.fallback_random = not torch.cuda.is_available()  # a CPU is faster with eager dropout
    return torch.compile(function, **options)


class KeptCaches:
    """new_caches in the last batch's memory, to which CUDA graphs are bound, unless that is in use."""

    def __init__(self, new_caches: Callable):
        self.new_caches, self.size, self.kept, self.user = new_caches, None, [], lambda: None

    def __call__(self, *size: int) -> list[KVCache]:
        if size != self.size or self.user() is not None:
            with torch.inference_mode(False):  # its tensors could not be written to outside of it
                self.size, self.kept = size, [(cache.k, cache.v) for cache in self.new_caches(*size)]
        for buffer in itertools.chain(*self.kept):
            torch._dynamo.mark_static_address(buffer.zero_())
        caches = [KVCache(k, v) for k, v in self.kept]
        self.user = weakref.ref(caches[0])  # alive as long as the generator is
        return caches


def pack_linears(model: nn.Module) -> None:
    """A CPU's Linears get weights in oneDNN's order: products of a few rows take a half to a tenth of the time."""
    onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    packed = {torch.float32} | ({torch.bfloat16} if has_fast_bfloat16(torch.device("cpu")) else set())  # else refused
    for linear in model.modules():  # one by one: a second copy of all weights is never needed
        weight = linear.weight if type(linear) is nn.Linear else None
        if onednn and isinstance(weight, nn.Parameter) and weight.device.type == "cpu" and weight.dtype in packed:
            del linear.weight
            linear.weight = w = onednn._reorder_linear_weight(weight.detach(), None)
            linear.forward = lambda x, w=w, b=linear.bias: onednn._linear_pointwise(x, w, b, "none", [], "")


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """attend by torch's kernel; in plain products where they are 2 to 9 times faster: bfloat16 on most CPUs."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not slow or (HAS_AMX and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v, parts = q / HEAD_DIM**0.5, k.transpose(-1, -2).contiguous(), v.contiguous(), []
    for i in range(0, q.shape[2], 128):  # queries at a time: their scores stay in the processor's cache
        scores = q[:, :, i : i + 128] @ k
        if mask is not None:
            scores = scores.masked_fill(~mask[i : i + 128], -math.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2)


@torch.compiler.substitute_in_graph(rotate)
def _rotate_in_real_numbers(x: Tensor, rope: Tensor) -> Tensor:
    # for torch.compile, which knows no complex numbers, but fuses these seven passes into one
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def keep_freed_memory() -> None:
    """Keeps large freed blocks, which Linux's malloc gives back; saves a tenth of a training step."""
    malloc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(malloc, "mallopt"):  # glibc
        malloc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        malloc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks when 2 GB lie free at its end


def command_line(main: Callable) -> None:
    """Exits with main()'s code, or with one line and 2 (mistake), 3 (not finite), 130 (Ctrl-C)."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # some schedulers close it
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # for letters that a terminal lacks
    try:
        sys.exit(main())
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        print(f"error: torch.compile: {str(error).splitlines()[0]}; or leave out --compile", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print("stopped" if stopped else f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(130 if stopped else 3 if isinstance(error, FloatingPointError) else 2)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """--device auto|cpu|cuda|mps -> the device; auto takes the fastest. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    require(there[name], f"--device {name}: not available here; take another or none")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, 2 to 4 times as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or HAS_AMX)


class Processes(typing.NamedTuple):
    """The processes that work together, each with its device: torchrun's, or this one alone."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: torch.device) -> "Processes":
        """Joins torchrun's other processes, if there are any; each has a GPU of its own."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        with about("WORLD_SIZE is set, as by torchrun"):
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(device, torch.distributed.get_rank(), torch.distributed.get_world_size())

    def reduce(self, value: Tensor, operation: str = "SUM") -> Tensor:
        """The SUM, MAX or MIN of value over all processes."""
        if self.world == 1:
            return value
        there = value.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(there, getattr(torch.distributed.ReduceOp, operation))
        return there.to(value.device)

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def first_alone(self, action: Callable) -> typing.Any:
        """action(), first in process 0: what it writes, the others find. If it fails, all end."""
        failure = None
        try:
            result = action() if self.rank == 0 else None
        except (ValueError, OSError) as error:
            failure = error
        if self.reduce(torch.tensor(failure is not None, dtype=torch.int32), "MAX"):
            raise failure or SystemExit(2)
        return result if self.rank == 0 else action()


def fingerprint(models: list[nn.Module]) -> str:
    """SHA-256 of the models' configs and weights, in hexadecimal: what their output depends on."""
    digest = hashlib.sha256(str([model.config for model in models]).encode())
    for value in (value for model in models for value in model.state_dict().values()):
        digest.update(value.flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def to_uint8(images: Tensor) -> Tensor:
    """Float images, -1 ... 1 -> uint8 as ADM rounds: 127.5 x + 128, clamped to 0 ... 255, truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.float() / 127.5 - 1


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, which is clamped to [-1, 1]: float [B, 3, H, W] twice -> [B]."""
    return -10 * ((images.clamp(-1, 1) - references).div(2) ** 2).flatten(1).mean(1).log10()


def tile(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Float images [n, 3, H, W] in [-1, 1] -> one picture with white gaps, row by row."""
    images = F.pad(images, (gap, 0, gap, 0, 0, 0, 0, -len(images) % columns), value=1.0)  # [rows · columns, 3, H, W]
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [3, rows · H, ...]
    pixels = to_uint8(F.pad(rows, (0, gap, 0, gap), value=1.0))
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def load_rgb(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, alpha on white, not turned (as ADM). Raises ValueError or OSError."""
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which convert() would clip: their range is a guess
                values = np.asarray(image, np.float64)
                top = next((top for top in (1, 255, 65535) if values.max() <= 1.5 * top), values.max())
                require(values.min() >= -top / 2 and top < math.inf, f"pixels from {values.min()} to {top}")
                return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
        except Exception as error:  # a damaged file can make a decoder fail in any way there is
            raise ValueError(f"{path}: not a readable image ({error})") from None


def shrink(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize of the short side to size: BOX halves it while it is at least 2 size, then BICUBIC."""
    if max(image.size) > 32 * min(image.size):  # only the middle, else 65,000 x 1 becomes gigabytes
        image = ImageOps.fit(image, [min(side, 32 * min(image.size)) for side in image.size])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: the middle square of the image whose short side is size."""
    image = shrink(image, size)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def center_crops(images: Iterable[Image.Image], size: int) -> Tensor:
    """The centre crops of images, float32 [n, 3, size, size] in [-1, 1]."""
    crops = np.stack([np.array(center_crop(image, size)) for image in images])
    return to_float(torch.from_numpy(crops).permute(0, 3, 1, 2))


def list_images(folder: str | Path) -> list[str]:
    """The images below a folder, hidden ones and links back up left out: sorted relative names, "/" between folders.
    Raises ValueError if there are none, OSError naming what is closed or a link to nothing."""
    os.scandir(folder).close()  # a file would be walked like a folder
    found, to_do = [], [(Path(folder), ())]
    while to_do:
        path, above = to_do.pop()
        info = path.stat()
        above += ((info.st_dev, info.st_ino),)
        if stat.S_ISDIR(info.st_mode) and len(set(above)) == len(above):
            to_do += [(inner, above) for inner in path.iterdir() if not inner.name.startswith((".", "__MACOSX"))]
        elif stat.S_ISREG(info.st_mode) and path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(path.relative_to(folder).as_posix())
    require(bool(found), f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)
