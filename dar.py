"""D-AR in one file: image diffusion as next-token prediction.

After Gao & Shou, "D-AR: Diffusion via Autoregressive Models", arXiv 2505.23660, whose sections,
equations and tables are cited as "section 4", "eq. 3", "Table 2". This file is a lesson: it is read
from top to bottom, needs PyTorch alone, and defines, trains, loads and samples every model.

The idea
    A flow turns noise into an image in K = 8 steps. A tokenizer writes an image as N = 256 tokens
    in K groups, and step k of the flow is told what to do by group k. So the tokens stand in the
    order of the flow: the first groups decide the layout, the last ones the detail. A plain Llama
    learns to write the tokens from left to right. Whenever it has finished a group, the picture
    can take its next step at once. To write tokens is to run the diffusion.

One image on its way through the models, with the sizes of the paper's
    image [3, 256, 256]                                     noise [3, 256, 256]
      |  cut into patches of 16x16 pixels                     |  cut into patches of 8x8 pixels
    256 patches, and 256 learned queries                    1024 patches
      |  encoder                   (chapter 5)                |
    256 features f, one for each query                        |
      |  quantizer                 (chapter 2)                |
    256 tokens, the numbers of 256 code vectors z             |
      |  (the Llama of chapter 6 learns to write tokens)      |
      |  causal decoder            (chapter 5)                |
    256 vectors z', 8 groups of 32  -- group k, step k -->  diffusion decoder (chapter 4), 8 steps
                                                              |
                                                            image [3, 256, 256]

Chapters                                                            where the paper has it
    1  Schedule and flow   times, groups, a step of the flow        eq. 3, 4, 5, 8, Table 2
    2  Quantizer           features to tokens                       eq. 1, appendix I
    3  Attention           rotary positions, the two plain blocks   section 4, appendix I
    4  Diffusion decoder   the network of the flow                  eq. 2, Fig. 4
    5  Tokenizer           Fig. 4 whole, and how it is trained      eq. 7, Tables 1, 2, 6, 7
    6  Llama               the model of tokens, and its training    eq. 6, section 4
    7  Sampling            guidance, cache, flow, streaming         section 3.3, 5, Fig. 1, Table 4
    8  Weights in files    ours and the authors'

Symbols, the paper's where it has them
    x0, x1, x_t   noise; the image (in the code: data_scale · image, see the table below); the
                  point between them at time t
    t             flow time: 0 is noise, 1 is the image
    s             uniform time, the paper's t'; t is a bent s (chapter 1)
    v             velocity of the flow, x1 - x0; in attention, v are the values
    N, K          number of tokens of an image; number of groups of tokens
    k             a group, 0 ... K-1; in attention, k are the keys
    f, z, z'      a feature; the code vector nearest to it; what the causal decoder makes of z
    S             steps that draw a picture, K by default
    V, D          size of the codebook, the number of different tokens (16384); numbers in a code
                  vector (8)
    R             times at which one encoded image is denoised in a training step (chapter 5)
    B, C, P       in shapes: images in a batch; width of a model; patches of an image

Words that the paper takes as known
    LPIPS         distance of two images in the features of a trained network (VGG-16), which
                  judges much as people do
    REPA          an extra loss: from a hidden state of the model, predict the features that a
                  trained network (DINOv2) has of the image
    AdaLN-zero    a condition shifts and scales a block's LayerNorms and gates what the block adds;
                  the gates start at zero
    guidance      classifier-free guidance, cfg: what the class changes in a model's answer,
                  exaggerated (chapter 7)
    FID, rFID     a distance of two sets of images; rFID: of images and their reconstructions

What is the paper's, what the released weights', what ours (to come back to)
                                the paper's text   released weights   our presets and recipes
    data scale (chapter 4)      1                  0.6                0.6; "shapes" 1
    l_fm / data_scale² (5)      -                  yes                yes
    group rule (1)              "ceil"             "nearest"          "ceil"
    beta (1)                    2                  2                  2; "shapes" 4, "cifar10" 8
    kept tokens (5)             -                  yes                yes
    times R (5)                 1                  1                  1; small models 2 to 4
    codebook warm-up (5)        no                 no                 no; small models yes
    LPIPS and REPA (5)          yes                yes                yes; small models no
    guidance (7)                L 1.1 to 8, XL 1.1 to 10              1.1 to 8 by default
    solver (1)                  Adams 2nd          Adams 2nd          the same, "ab2"
    Loading the released weights sets their scale, rule and beta. The preset "v1" has their sizes
    and scale, but the paper's rule. Numbers quoted from the paper, here and in the README (1.52
    rFID, Table 2; 2.09 FID with XL, Table 3), were measured by its authors with their weights.
"""

import dataclasses
import math
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64  # width of every attention head, in the tokenizer and in the Llama
EPS = 1e-6  # of every LayerNorm


# ------------------------------------------------------------------------------
# 1. Schedule and flow
#
# Flow matching draws a straight line from noise x0 ~ N(0, I) to an image x1, and moves along it:
#     x_t = t x1 + (1 - t) x0        for t from 0 (noise) to 1 (image)                       eq. 3
#     v = d x_t / dt = x1 - x0       the velocity, the same everywhere on the line           eq. 4
# Many such lines pass through a point x_t. A network learns to predict v from x_t and t, and what
# it learns is their mean, which changes along the way. So a picture is drawn in several steps:
# start at noise, follow the predicted velocity a little, predict anew.
#
# D-AR's own idea is which tokens the network sees at which time. Time is cut into K parts, and in
# part k the network is given the vectors z' of group k alone. So group k must say what the flow
# needs to know in part k: early groups say where things are, since noise still hides the rest;
# late groups say what the details are. (A group's z' also carries what the groups before it have
# said. That is the causal decoder's work, in chapter 5.)
#
# The parts are equal in a uniform time s, and the flow's time t is a bent s:
#     t = s / (s + beta (1 - s))                                                             eq. 8
# With beta > 1 early flow times, where the layout is decided, get more than their share of the
# parts, and so of the tokens.
#
# Example: K = 4, beta = 2. Four steps draw a picture; they start at s = 0, 1/4, 1/2 and 3/4.
#     s                        0      0.125  0.25   0.375  0.5    0.625  0.75   0.875  1
#     t                        0      0.067  0.143  0.231  0.333  0.455  0.6    0.778  1
#     group, rule "ceil"       0      0      1      1      2      2      3      3      3
#     group, rule "nearest"    0      1      1      2      2      3      3      3      3
# When a picture is drawn in K steps, both rules give step k group k, as at these four times. They
# differ in training: "ceil" trains group k at times after s = k/K, "nearest" at those around it.


def shift_time(s: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 8: uniform time s in [0, 1] -> flow time t = s / (s + beta (1 - s)) in [0, 1]."""
    return s / (s + beta * (1 - s))


def unshift_time(t: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 5, the inverse: t in [0, 1] -> s = t / (t + (1 - t) / beta). For whoever has a flow time
    and asks for its group; training and sampling here start from s."""
    return t / (t + (1 - t) / beta)


def condition_group(s: Tensor | float, num_groups: int, rule: str = "ceil") -> Tensor | int:
    """Eq. 5: the group k in 0 ... K-1 that conditions the flow at uniform time s in [0, 1]. A group
    begins at an edge, and k is the number of edges that s has reached:
        "ceil"      edges 1/K, 2/K, ...               each group owns one K-th of s
        "nearest"   edges 1/(2K), 3/(2K), 5/(2K) ...  each group owns the s nearest to k/K
    "ceil" is the paper's rule: counted from one, its group is ceil(s K). That differs from ours
    only at an edge, where a step of the flow needs the group of the time that begins there.

    s: float tensor -> int64 tensor; number -> int. Raises ValueError on another rule."""
    if rule not in ("ceil", "nearest"):
        raise ValueError(f"group rule {rule!r}: expected 'ceil' or 'nearest'")
    if not isinstance(s, Tensor):
        s = torch.tensor(s, dtype=torch.float64, device="cpu")
        return int(condition_group(s, num_groups, rule))
    edges = torch.arange(1, num_groups, dtype=s.dtype, device=s.device)
    if rule == "nearest":
        edges = edges - 0.5
    return torch.bucketize(s.contiguous(), edges / num_groups, right=True)


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Eq. 3: x_t = t x1 + (1 - t) x0, for noise x0 and images x1 [B, 3, H, W] at times t [B]."""
    t = t.view(-1, 1, 1, 1)
    return t * x1 + (1 - t) * x0


def jump_estimate(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Section 5.1: straight on from x_t to time 1, x1 = x_t + (1 - t) v. A preview is this. It
    costs no network call, since a sampling step has computed v.
    x_t, v: [B, 3, H, W]. t: [B], or [1] for all."""
    return x_t + (1 - t.view(-1, 1, 1, 1)) * v


class FlowStep(NamedTuple):
    """A step of the flow: from time t to t_next, conditioned by this group."""

    t: float
    t_next: float
    group: int


def sampling_schedule(num_steps: int, num_groups: int, beta: float, rule: str) -> list[FlowStep]:
    """Eq. 8: the S steps that draw a picture; step i begins at s = i/S and ends at (i+1)/S.
    With S = K, the paper's default, each group is used once. S < K skips groups, S > K uses some
    again. Raises ValueError."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"{num_steps} sampling steps: expected an integer, at least 1")
    steps = []
    for i in range(num_steps):
        t = shift_time(i / num_steps, beta)
        t_next = shift_time((i + 1) / num_steps, beta)
        steps.append(FlowStep(t, t_next, condition_group(i / num_steps, num_groups, rule)))
    return steps


def solver_step(x: Tensor, v: Tensor, v_prev: Tensor | None, dt: float, solver: str) -> Tensor:
    """One step of length dt from x, where the velocity is v, and was v_prev one step before:
        "euler"   x + dt v
        "ab2"     x + dt (3/2 v - 1/2 v_prev)     two-step Adams-Bashforth, "Adams 2nd" in Table 2
    Without a step before (v_prev is None) ab2 takes Euler's. For equal steps ab2 extrapolates v to
    the middle of the step. Here steps are unequal, and v_prev was predicted with another group of
    tokens than v. The paper uses ab2 all the same, and so do we. Raises ValueError."""
    if solver not in ("euler", "ab2"):
        raise ValueError(f"solver {solver!r}: expected 'euler' or 'ab2'")
    if solver == "ab2" and v_prev is not None:
        v = 1.5 * v - 0.5 * v_prev
    return x + dt * v


# ------------------------------------------------------------------------------
# 2. Quantizer
#
# The encoder (chapter 5) has read our image and gives N feature vectors f, one for each of the
# learned queries q_1 ... q_N. The quantizer replaces each f by the nearest of the V rows of a
# codebook. That row is z, and its number is the token:
#     [z_1, ..., z_N] = quant(encoder(image, [q_1, ..., q_N]))                                eq. 1
# Features and rows are compared as directions: both are divided by their length (appendix I). Then
# |f - z|^2 = 2 - 2 f·z, so the nearest row is the one with the largest inner product. (For this
# search f need not be divided: a positive factor does not change which product is the largest.)
#
# Choosing a row has no gradient. So z passes its gradient on to f as if the two were equal
# ("straight through"), and two losses bring them together, where sg[] means "without gradient":
#     l_vq     = |sg[f] - z|^2       moves the codebook's rows to the features
#     l_commit = |f - sg[z]|^2       keeps the features near the rows


class VectorQuantizer(nn.Module):
    """A codebook of V directions of dimension D (eq. 1, appendix I), always in float32."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        # Fresh rows are N(0, 1): once normalised, directions spread evenly.
        self.embedding = nn.Embedding(codebook_size, code_dim)

    def lookup(self, codes: Tensor) -> Tensor:
        """Tokens int64 [...], 0 ... V-1 -> their rows, float32 [..., D], of length one."""
        return F.normalize(self.embedding(codes).float(), dim=-1)

    @torch.no_grad()
    def nearest_code(self, f: Tensor) -> Tensor:
        """Features [B, N, D] -> tokens int64 [B, N]: for each the number of the nearest row."""
        with torch.autocast(f.device.type, enabled=False):
            rows = F.normalize(self.embedding.weight.float(), dim=-1)  # [V, D]
            return (f.float() @ rows.T).argmax(-1)

    def forward(self, f: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [B, N, D], keep bool [B, N] (chapter 5 says which tokens these are) -> z
        [B, N, D], codes int64 [B, N], l_vq, l_commit.
        Both losses are means over the D numbers of a token and over the tokens where keep is true.
        """
        f = F.normalize(f.float(), dim=-1)
        codes = self.nearest_code(f)
        z = self.lookup(codes)
        l_vq = ((f.detach() - z).pow(2).mean(-1) * keep).sum() / keep.sum()
        l_commit = ((f - z.detach()).pow(2).mean(-1) * keep).sum() / keep.sum()
        z = f + (z - f).detach()  # has the value of z, and passes its gradient to f
        return z, codes, l_vq, l_commit

    @torch.no_grad()
    def start_from(self, f: Tensor) -> None:
        """Replaces the rows by V of the features f [n, D], n >= V, chosen at random. Ends a
        codebook warm-up (chapter 5)."""
        chosen = torch.randperm(len(f), device="cpu")[: len(self.embedding.weight)]
        self.embedding.weight.copy_(F.normalize(f[chosen.to(f.device)].float(), dim=-1))


# ------------------------------------------------------------------------------
# 3. Attention and blocks
#
# A token's query q is compared with the keys k of the tokens that it may attend to, and the result
# is a mean of their values v, weighted by how well the keys fit:
#     attend(q, k, v) = softmax(q k^T / sqrt(64)) v
# A rotary embedding (RoPE) tells attention where tokens are: each pair of numbers in a query or key
# is turned by an angle proportional to the token's position. The product of a turned query and a
# turned key then depends only on how far apart the two tokens are.


def rope_1d(position: Tensor) -> Tensor:
    """Positions in a sequence, int64 [n] -> rotations float32 [n, 32, 2], the last two cos and sin.
    Pair i of a head's 32 pairs turns by the angle position · 10000^(-i/32)."""
    pair = torch.arange(32, dtype=torch.float32, device=position.device)
    angles = position[:, None] * 10000.0 ** (-pair / 32)
    return torch.stack((angles.cos(), angles.sin()), -1)


def rope_2d(height: int, width: int, num_queries: int, device: torch.device) -> Tensor:
    """Rotations of a height x width grid of patches, row by row, and of num_queries learned queries
    after them: float32 [height·width + num_queries, 32, 2]. The first 16 pairs of a head turn by
    the row, the last 16 by the column, pair i by that · 10000^(-i/16). Queries have no position in
    the image: they are not turned, like the first patch (appendix I)."""
    pair = torch.arange(16, dtype=torch.float32, device=device)
    frequency = 10000.0 ** (-pair / 16)
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    angles = torch.cat((row[:, None] * frequency, column[:, None] * frequency), -1)  # [P, 32]
    angles = F.pad(angles, (0, 0, 0, num_queries))
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the pairs of neighbours in x [B, heads, n, 64] by rope [n, 32, 2], in float32:
    a pair (a, b) becomes (a cos - b sin, a sin + b cos)."""
    a, b = x.float().unflatten(-1, (32, 2)).unbind(-1)  # [B, heads, n, 32] each
    cos, sin = rope.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return turned.flatten(-2).to(x.dtype)


def causal_mask(position: Tensor, length: int) -> Tensor:
    """bool [n, length]: may the token at position[i] (int64 [n]) attend to the one at position j?
    True for j <= position[i]."""
    return torch.arange(length, device=position.device) <= position[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(64)) v for queries [B, heads, n, 64], keys and values [B, heads, m, 64].
    mask: bool [n, m], true where a query may attend to a key; everywhere if None."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor) -> Tensor:
    """[B, n, C] -> [B, heads, n, 64]."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, n, 64] -> [B, n, C]."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The tokenizer's attention, of x to itself or to a context. Queries and keys pass a LayerNorm
    (appendix I)."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(HEAD_DIM, eps=EPS)
        self.k_norm = nn.LayerNorm(HEAD_DIM, eps=EPS)

    def forward(self, x: Tensor, context=None, rope=None, mask=None) -> Tensor:
        """x [B, n, C] attends to itself, or to context [B, m, C] -> [B, n, C].
        rope [n, 32, 2] turns queries and keys. A context has no position in the image, and its keys
        are not turned; then a turned query says where in the image it asks from. mask: attend's."""
        source = x if context is None else context
        q = self.q_norm(split_heads(self.q(x)))  # [B, heads, n, 64]
        k = self.k_norm(split_heads(self.k(source)))  # [B, heads, m, 64]
        v = split_heads(self.v(source))
        if rope is not None:
            q = rotate(q, rope)
        if rope is not None and context is None:
            k = rotate(k, rope)
        # Under autocast, norms return float32. Attention is to run in the precision of v.
        out = attend(q.to(v.dtype), k.to(v.dtype), v, mask)
        return self.proj(merge_heads(out))


class MLP(nn.Module):
    """Linear - SiLU - Linear with a hidden width of 4 C."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class GatedBlock(nn.Module):
    """The block of encoder and causal decoder. Its learned gates start at zero, so that a fresh
    block is the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = Attention(width)
        self.mlp = MLP(width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.gate1 = nn.Parameter(torch.zeros(width))
        self.gate2 = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rope=None, mask=None) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope=rope, mask=mask)
        return x + self.gate2 * self.mlp(self.norm2(x))


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def init_linears(module: nn.Module, std: float) -> None:
    """Truncated normal weights of standard deviation std and zero biases, in every Linear and
    convolution below module."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------
# 4. Diffusion decoder
#
# The network of the flow, D_FM in Fig. 4. It is trained to predict the velocity from the point x_t,
# the time t and c(t), the vectors z' of the group that chapter 1 assigns to this time (here
# group_z):
#     l_fm = mean of |v - D_FM(x_t, t, c(t))|^2                                               eq. 2
#
# It is a diffusion transformer (DiT) on patches of pixels. In each block a condition m shifts,
# scales and gates what attention and MLP do:
#     x + gate · layer(shift + (1 + scale) · norm(x))      the layer is attention, then MLP
# where shift, scale and gate are a Linear of m (AdaLN-zero). In DiT one m serves the whole picture.
# Here every patch has its own: what this patch reads from the group's tokens by cross-attention,
# plus an embedding of the time. What was read is not added to x. So tokens never become a part of
# the picture that passes through the blocks; they only say how each block treats it.
#
# Two things that the paper's text does not tell, but its weights need. The flow ends at
# x1 = 0.6 · image ("data scale"), not at the image. Noise keeps its size, so it hides a fainter
# image for longer, and more steps see only the layout. And the tokens are prepared twice: cond_mlp
# brings z' to this network's width, once for all blocks; then each block's cond_embed prepares them
# in a way of its own.


class TimeEmbedding(nn.Module):
    """Flow times t [B] in [0, 1] -> [B, C]: waves of many lengths, then Linear - SiLU - Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def waves(self, t: Tensor) -> Tensor:
        """cos, then sin of 1000 t · 10000^(-i / (C/2)), i < C/2: float32 [B, C]."""
        half = self.width // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = 1000 * t.float()[:, None] * 10000.0 ** (-i / half)
        return torch.cat((angles.cos(), angles.sin()), -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.waves(t).to(self.mlp[0].weight.dtype))


class DiffusionBlock(nn.Module):
    """DiT's block, modulated patch by patch (section 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = Attention(width)
        self.cross_attn = Attention(width)
        self.mlp = MLP(width)
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, t: Tensor, group_z: Tensor, rope: Tensor) -> Tensor:
        """Patches x [B, P, C]; t [B] or [1]; the group's tokens as cond_mlp gave them, [B, n, C];
        rope [P, 32, 2] -> [B, P, C]."""
        context = layer_norm(self.cond_embed(group_z))  # [B, n, C]
        normed = layer_norm(x)
        m = self.cross_attn(normed, context=context, rope=rope)  # [B, P, C], what each patch reads
        m = m + self.time_embed(t)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(m).chunk(6, -1)
        x = x + gate1 * self.attention(shift1 + (1 + scale1) * normed, rope=rope)
        return x + gate2 * self.mlp(shift2 + (1 + scale2) * layer_norm(x))


class DiffusionDecoder(nn.Module):
    """D_FM of eq. 2. For eq. 7, the hidden state that enters block repa_layer also goes through the
    REPA head, a small network whose result the training compares to DINOv2's features. There is
    no head if repa_layer is None."""

    # DINOv2 ViT-B/14 sees 224x224 pixels as 16x16 features of width 768.
    REPA_GRID = 16
    REPA_WIDTH = 768
    REPA_HIDDEN = 2048

    def __init__(
        self,
        width: int,
        token_width: int,
        depth: int,
        patch_size: int,
        repa_layer: int | None,
        std: float = 0.02,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.repa_layer = repa_layer
        self.cond_mlp = nn.Linear(token_width, width)
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.patch_out = nn.Linear(width, 3 * patch_size**2)
        if repa_layer is not None:
            self.repa_head = nn.Sequential(
                nn.Linear(width, self.REPA_HIDDEN),
                nn.SiLU(),
                nn.Linear(self.REPA_HIDDEN, self.REPA_HIDDEN),
                nn.SiLU(),
                nn.Linear(self.REPA_HIDDEN, self.REPA_WIDTH),
            )
        init_linears(self, std)
        nn.init.zeros_(self.patch_out.weight)  # the first velocity is 0
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)  # a fresh block is the identity

    def forward(
        self, x_t: Tensor, t: Tensor, group_z: Tensor, repa: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x_t [B, 3, H, W]; t [B], or [1] for all; group_z, a group's z', [B, n, token_width].
        -> velocity float32 [B, 3, H, W]; and with repa, the REPA head's output [B, g·g, 768]."""
        height = x_t.shape[2] // self.patch_size
        width = x_t.shape[3] // self.patch_size
        rope = rope_2d(height, width, 0, x_t.device)
        group_z = layer_norm(self.cond_mlp(group_z))  # [B, n, C], for all blocks
        patches = F.pixel_unshuffle(x_t, self.patch_size)  # [B, 3·size², H/size, W/size]
        patches = patches.flatten(2).transpose(1, 2)  # [B, P, 3·size²], each as (channel, row, col)
        x = self.patch_in(patches.to(self.patch_in.weight.dtype))
        repa_features = None
        for i, block in enumerate(self.blocks):
            if repa and i == self.repa_layer:
                repa_features = self.read_repa(x, height, width)
            x = block(x, t, group_z, rope)
        out = self.patch_out(layer_norm(x)).float()  # [B, P, 3·size²]
        out = out.transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(out, self.patch_size), repa_features

    def read_repa(self, x: Tensor, height: int, width: int) -> Tensor:
        """Hidden state [B, height·width, C] -> [B, g·g, 768]: the grid of patches averaged to
        g = 16 where it is larger, kept where it is smaller."""
        grid = x.transpose(1, 2).unflatten(2, (height, width))
        size = (min(height, self.REPA_GRID), min(width, self.REPA_GRID))
        grid = F.adaptive_avg_pool2d(grid, size)
        return self.repa_head(grid.flatten(2).transpose(1, 2))


# ------------------------------------------------------------------------------
# 5. Tokenizer
#
# Fig. 4, the figure at the head of this file. Our image arrives as 16x16 patches.
#
# Encoder. Patches and queries go through a transformer together. Query i reads all patches and the
# queries before it. A patch reads no query: otherwise query i could read in a patch, one block
# later, what a later query had put there, and the order of the tokens would be lost.
#
# Causal decoder. The diffusion decoder is given one group only, so that every step costs the same;
# but step k should also know what the earlier groups have said. So a transformer lets every token
# read the tokens before it, and z' brings along what they said. It must be causal: z' of group k
# has to be complete before group k + 1 is written.
#
# Training. For each image a time s is drawn. The image is encoded and quantized; the group of that
# time is taken out of z'; the diffusion decoder predicts the velocity at that time; and the loss is
#     l = l_fm + (l_vq + 0.25 l_commit) + 0.5 l_LPIPS + 0.5 l_repa                            eq. 7
# l_fm alone gives blurred pictures: the mean of all details that would fit is smooth. l_LPIPS asks
# that the jump estimate of x1 looks like the image. l_repa speeds learning. (Like the authors' code
# we divide l_fm by data_scale², so that the scale does not change its weight in this sum.)
#
# Kept tokens. The causal decoder being causal, z' of group k depends on the tokens up to the end of
# group k, and on no later one. So the later tokens had no part in this velocity, and no error of a
# picture tells the encoder what they should say. l_vq and l_commit alone would only pull their
# features to whichever rows are nearest, and hold them there. Therefore both losses are means over
# the tokens that are "kept": those up to the end of the group that was drawn. (The paper does not
# say so; the authors' code does it.)
#
# Three things are ours, and only small models use them (their recipes are in train_tokenizer.py):
# * R flow times an encoding. Encoder and causal decoder together cost a small model as much as the
#   diffusion decoder. So each image is encoded once and denoised at R times, each with its own
#   noise. Kept are the tokens up to the last of the R groups.
# * Codebook warm-up. The gates of a fresh encoder are zero, so query i gives the same feature for
#   every image. Few codes would be used, and the others would never be chosen and never learn. So
#   for the first 150 to 200 steps nothing is quantized, and l_vq = l_commit = 0. Noise is added to
#   each feature instead. What is warmed up is the encoder: if its features are to be told apart in
#   spite of the noise, they must spread over the sphere. In the end V features of images, chosen
#   at random, become the codebook (start_from), and quantizing begins.
# * Fresh weights of a larger standard deviation (init_std), for narrow models.

# Standard deviation of the warm-up's noise. In 8 dimensions its length is about 0.5, the distance
# of a feature from the nearest of 1024 codes that are spread evenly.
WARMUP_NOISE = 0.18


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """All that shapes a tokenizer; the defaults are the preset "v1". Raises ValueError, naming the
    value, on what cannot be built."""

    image_size: int = 256  # pixels a side, of what is encoded and, without noise given, decoded
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
    data_scale: float = 0.6  # x1 is data_scale · image
    group_rule: str = "ceil"  # of condition_group
    repa_layer: int | None = 8  # REPA reads the state that enters this block; None: no REPA head
    commit_weight: float = 0.25  # of l_commit
    init_std: float = 0.02  # of fresh Linears
    max_tokens: int = 1024  # rows of the tables of queries and positions; the first N are used

    def __post_init__(self):
        check_types(self)
        for name in ("encoder_width", "decoder_width", "diffusion_width"):
            check_width(name, getattr(self, name))
        for name in ("encoder_patch", "diffusion_patch"):
            patch = getattr(self, name)
            if patch < 1 or self.image_size < 1 or self.image_size % patch != 0:
                raise ValueError(f"image size {self.image_size} is no multiple of {name} = {patch}")
        if not 1 <= self.num_tokens <= self.max_tokens:
            raise ValueError(f"N = {self.num_tokens} tokens: expected 1 ... {self.max_tokens}")
        if self.num_groups < 1 or self.num_tokens % self.num_groups != 0:
            raise ValueError(f"N = {self.num_tokens} tokens: not {self.num_groups} equal groups")
        if self.codebook_size < 1 or self.code_dim < 1:
            raise ValueError(f"codebook of {self.codebook_size} codes of {self.code_dim} numbers")
        if self.diffusion_layers < 1 or self.encoder_layers < 0 or self.decoder_layers < 0:
            raise ValueError(f"{self}: a number of layers is too small")
        if self.repa_layer is not None and not 0 <= self.repa_layer < self.diffusion_layers:
            raise ValueError(
                f"repa_layer = {self.repa_layer}: expected a block of {self.diffusion_layers}"
            )
        if not self.time_shift > 0 or not self.data_scale > 0 or self.num_steps < 0:
            raise ValueError(f"{self}: time_shift, data_scale or num_steps is out of range")
        condition_group(0.0, self.num_groups, self.group_rule)

    @property
    def group_size(self) -> int:
        """Tokens in a group, N / K."""
        return self.num_tokens // self.num_groups


def check_types(config) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = int | float if field.type is float else field.type
        if not isinstance(value, wanted):
            raise ValueError(f"{field.name} = {value!r}: expected {field.type}")


def check_width(name: str, width: int) -> None:
    if width < HEAD_DIM or width % HEAD_DIM != 0:
        raise ValueError(
            f"{name} = {width}: expected a multiple of {HEAD_DIM}, the width of a head"
        )


TOKENIZER_PRESETS = {
    # The paper's tokenizer: 307M parameters, of which its 300M leave out the REPA head.
    "v1": TokenizerConfig(),
    # The smaller one of the ablations in appendix III, 113M.
    "lite": TokenizerConfig(
        encoder_width=512, decoder_width=512, diffusion_width=512, diffusion_layers=8, repa_layer=5
    ),
    # Ours, 4.4M parameters, for 32x32 pixels: trains on two CPU cores.
    "tiny": TokenizerConfig(
        image_size=32,
        encoder_patch=4,
        encoder_width=128,
        encoder_layers=4,
        decoder_width=128,
        decoder_layers=4,
        num_tokens=64,
        codebook_size=1024,
        diffusion_patch=4,
        diffusion_width=128,
        diffusion_layers=6,
        repa_layer=None,
        init_std=0.08,
    ),
    # Ours, 0.6M parameters, for 16x16 pixels: a first training in minutes.
    "shapes": TokenizerConfig(
        image_size=16,
        encoder_patch=4,
        encoder_width=64,
        encoder_layers=2,
        decoder_width=64,
        decoder_layers=4,
        num_tokens=16,
        num_groups=4,
        codebook_size=64,
        diffusion_patch=4,
        diffusion_width=64,
        diffusion_layers=2,
        time_shift=4.0,
        data_scale=1.0,
        repa_layer=None,
        init_std=0.125,
    ),
}
# The shipped model's.
TOKENIZER_PRESETS["cifar10"] = dataclasses.replace(TOKENIZER_PRESETS["tiny"], time_shift=8.0)


class SequentialDiffusionTokenizer(nn.Module):
    """Fig. 4: images to N tokens in the order of diffusion time, and back. Calling it runs the
    training step's networks and returns what the loss needs."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        c = config
        self.config = config
        self.patchify = nn.Conv2d(3, c.encoder_width, c.encoder_patch, stride=c.encoder_patch)
        self.query_embedding = nn.Embedding(c.max_tokens, c.code_dim)  # a query is D numbers ...
        self.query_linear = nn.Linear(c.code_dim, c.encoder_width)  # ... widened
        self.encoder_layers = nn.ModuleList(
            GatedBlock(c.encoder_width) for _ in range(c.encoder_layers)
        )
        self.quant_in = nn.Linear(c.encoder_width, c.code_dim, bias=False)
        self.quantize = VectorQuantizer(c.codebook_size, c.code_dim)
        self.quant_out = nn.Linear(c.code_dim, c.decoder_width, bias=False)
        self.decoder_embedding = nn.Embedding(c.max_tokens, c.decoder_width)  # learned positions
        self.decoder_layers = nn.ModuleList(
            GatedBlock(c.decoder_width) for _ in range(c.decoder_layers)
        )
        init_linears(self, c.init_std)
        # Codes enter the causal decoder with 50 times the magnitude of the positions. Otherwise z'
        # would hardly depend on the codes for a long time.
        nn.init.normal_(self.quant_out.weight)
        nn.init.normal_(self.decoder_embedding.weight, std=0.02)
        # After init_linears, which would undo the zero-initialised layers of the diffusion decoder.
        self.diffusion = DiffusionDecoder(
            c.diffusion_width,
            c.decoder_width,
            c.diffusion_layers,
            c.diffusion_patch,
            c.repa_layer,
            c.init_std,
        )

    def encoder(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> features [B, N, D] of eq. 1, not normalised yet."""
        c = self.config
        patches = self.patchify(images.to(self.patchify.weight.dtype))  # [B, C, H/p, W/p]
        height, width = patches.shape[2:]
        patches = layer_norm(patches.flatten(2).transpose(1, 2))  # [B, P, C], row by row
        queries = self.query_linear(self.query_embedding.weight[: c.num_tokens]).to(patches.dtype)
        x = torch.cat((patches, queries.expand(len(images), -1, -1)), 1)  # [B, P+N, C]
        rope = rope_2d(height, width, c.num_tokens, x.device)
        # A causal mask, but all columns of patches are open. Row by row: a patch's row is open for
        # the P patches and, being causal, closed for the queries, which come later. A query's row
        # is open for the patches, for the queries before it, and for itself.
        mask = causal_mask(torch.arange(x.shape[1], device=x.device), x.shape[1])  # [P+N, P+N]
        mask[:, : height * width] = True
        for block in self.encoder_layers:
            x = block(x, rope=rope, mask=mask)
        return self.quant_in(layer_norm(x[:, height * width :]))

    def causal_decoder(self, z: Tensor) -> Tensor:
        """Code vectors z [B, n, D] of the first n tokens -> z' [B, n, decoder_width]."""
        x = self.quant_out(z.to(self.quant_out.weight.dtype))
        x = x + self.decoder_embedding.weight[: z.shape[1]]
        mask = causal_mask(torch.arange(z.shape[1], device=z.device), z.shape[1])
        for block in self.decoder_layers:
            x = block(x, mask=mask)
        return layer_norm(x)

    def kept_tokens(self, s: Tensor) -> Tensor:
        """Times s [B, R] -> bool [B, N]: the tokens up to the end of the last of the R groups."""
        c = self.config
        group = condition_group(s, c.num_groups, c.group_rule)  # [B, R]
        end = (group.amax(1, keepdim=True) + 1) * c.group_size  # [B, 1]
        return torch.arange(c.num_tokens, device=s.device) < end

    def forward(
        self,
        images: Tensor,
        s: Tensor | None = None,
        noise: Tensor | None = None,
        code_noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The networks' part of a training step (section 4).
        images: float [B, 3, H, W] in [-1, 1].
        s: uniform times [B, R], or [B] for R = 1. One for each image is drawn if None.
        noise: x0 [B, R, 3, H, W], or with s [B] also [B, 3, H, W]; drawn if None.
        code_noise: [B, N, D], in a codebook warm-up alone: is added to the features, which then are
            not quantized.
        Returns what tokenizer_loss needs:
            fm          l_fm of eq. 2, divided by data_scale²
            vq, commit  means over the kept tokens, commit with its weight of 0.25
            pred_image  jump estimates [B·R, 3, H, W], divided by data_scale, not clamped
            repa        with a REPA head, its output [B·R, g·g, 768]
        and two things for train_tokenizer.py:
            kept        the number of kept tokens. A batch may be split among processes. The mean
                        over its tokens is the mean of the parts' means, weighted by this number.
            codes       int64 [B, N], of which it counts how many different ones occur"""
        c = self.config
        batch = len(images)
        if s is None:
            s = torch.rand(batch, 1, dtype=torch.float32, device=images.device)
        s = s.view(batch, -1)  # [B, R]
        times = s.shape[1]

        f = self.encoder(images)  # [B, N, D]
        keep = self.kept_tokens(s)  # [B, N]
        z, codes, l_vq, l_commit = self.quantize(f, keep)
        if code_noise is not None:  # codebook warm-up: z and the losses above are not used
            z = F.normalize(F.normalize(f.float(), dim=-1) + code_noise, dim=-1)
            l_vq = 0 * l_vq  # with a gradient of 0, since DDP expects one for each weight
            l_commit = 0 * l_commit

        z_prime = self.causal_decoder(z)
        groups = z_prime.unflatten(1, (c.num_groups, c.group_size))  # [B, K, N/K, C]
        k = condition_group(s, c.num_groups, c.group_rule)  # [B, R]
        row = torch.arange(batch, device=s.device)[:, None]  # [B, 1]
        group_z = groups[row, k]  # [B, R, N/K, C]: for each image and time its group
        group_z = group_z.flatten(0, 1)  # [B·R, N/K, C]

        t = shift_time(s, c.time_shift).flatten()  # [B·R]
        x1 = (c.data_scale * images.float()).repeat_interleave(times, 0)  # [B·R, 3, H, W]
        x0 = torch.randn_like(x1) if noise is None else noise.view(x1.shape)
        x_t = interpolate(x0, x1, t)
        v, repa_features = self.diffusion(x_t, t, group_z, repa=c.repa_layer is not None)

        out = {
            "fm": F.mse_loss(v, x1 - x0) / c.data_scale**2,
            "vq": l_vq,
            "commit": c.commit_weight * l_commit,
            "kept": keep.sum(),
            "pred_image": jump_estimate(x_t, v, t) / c.data_scale,
            "codes": codes,
        }
        if repa_features is not None:
            out["repa"] = repa_features
        return out

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1], H = W = config.image_size -> tokens int64 [B, N].
        Values up to 2 are taken, for what decode() returns is not clamped. Raises ValueError."""
        check_images(images, self.config.encoder_patch, self.config.image_size)
        if images.numel() > 0 and not images.abs().max() <= 2:
            raise ValueError(f"images up to {images.abs().max():.4g}: expected pixels in [-1, 1]")
        return self.quantize.nearest_code(self.encoder(images))

    def condition(self, codes: Tensor) -> Tensor:
        """Tokens int64 [B, n], n <= N -> z' [B, n, decoder_width]. Raises ValueError."""
        codes = check_codes("codes", codes, self.config.codebook_size, self.device)
        if codes.shape[1] > self.config.num_tokens:
            raise ValueError(f"{codes.shape[1]} codes: expected at most {self.config.num_tokens}")
        return self.causal_decoder(self.quantize.lookup(codes))

    def velocity(self, x_t: Tensor, t: Tensor, group_z: Tensor) -> Tensor:
        """D_FM(x_t, t, a group's z') of eq. 2, float32 [B, 3, H, W]."""
        return self.diffusion(x_t, t, group_z)[0]

    def decode(self, codes: Tensor, noise=None, num_steps=None, solver="ab2") -> Tensor:
        """Tokens int64 [B, n] -> images, float32 [B, 3, H, W], about in [-1, 1], not clamped.
        noise: x0 [B, 3, H, W], which sets the size; drawn at config.image_size if None.
        num_steps, solver: of the flow (chapters 1 and 7). Fewer than N tokens, in whole groups,
        give the preview after the last group (section 5.1, Table 5). Raises ValueError."""
        last = decode_steps(self, codes, noise, num_steps, solver)[-1]
        if last.codes.shape[1] < self.config.num_tokens:
            return last.preview
        return last.x

    def previews(self, codes: Tensor, noise=None, num_steps=None, solver="ab2") -> Tensor:
        """What decode() can show on its way (Fig. 5): the jump estimate of each step of the flow,
        in order, [steps, B, 3, H, W]."""
        last = decode_steps(self, codes, noise, num_steps, solver)[-1]
        return torch.stack(last.previews)


def check_images(images: Tensor, patch: int, size: int | None = None) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"images are {kind}: expected a float tensor in [-1, 1]; u / 127.5 - 1")
    shape = list(images.shape)
    if size is not None and shape[1:] != [3, size, size]:  # of another size tokens say little
        raise ValueError(f"images {shape}: expected [B, 3, {size}, {size}]; crop or shrink them")
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:] or shape[2] % patch or shape[3] % patch:
        raise ValueError(f"images {shape}: expected [B, 3, H, W], H and W multiples of {patch}")


INTEGERS = torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64


def check_codes(name: str, codes, count: int, device: torch.device, dims: int = 2) -> Tensor:
    """Codes, a tensor or a list of integers, as an int64 tensor on the device. Raises ValueError
    unless they are of dims dimensions and 0 ... count - 1."""
    try:
        codes = torch.as_tensor(codes, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} {codes!r:.60}: expected integers") from None
    if codes.ndim != dims or codes.numel() > 0 and codes.dtype not in INTEGERS:
        kind = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"{name}: {kind}, expected integers in {dims} dimensions")
    codes = codes.long()
    if codes.numel() > 0 and (codes.min() < 0 or codes.max() >= count):
        low, high = codes.min().item(), codes.max().item()
        raise ValueError(f"{name} from {low} to {high}: expected 0 ... {count - 1}")
    return codes


def tokenizer_loss(
    out, images, lpips=None, lpips_weight=0.5, repa_target=None, repa_weight=0.5
) -> dict[str, Tensor]:
    """Eq. 7 as its terms, each with its weight; the loss is their sum.
    out: what the tokenizer returned for images [B, 3, H, W] in [-1, 1].
    lpips: (images, images) -> their perceptual distances, a number for each pair.
    repa_target: DINOv2's features of the images, [B, g·g, 768]; the term is 1 - cosine.
    A term whose network is None is left out."""
    terms = {"fm": out["fm"], "vq": out["vq"], "commit": out["commit"]}
    times = len(out["pred_image"]) // len(images)  # R
    if lpips is not None:
        distance = lpips(out["pred_image"], images.repeat_interleave(times, 0))
        terms["lpips"] = lpips_weight * distance.mean()
    if repa_target is not None:
        target = repa_target.float().repeat_interleave(times, 0)
        cosine = F.cosine_similarity(out["repa"].float(), target, dim=-1)
        terms["repa"] = repa_weight * (1 - cosine.mean())
    return terms


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, updates: int) -> None:
    """Moves ema, a copy of model, towards it. So ema has an exponential moving average of the
    weights, which is smoother than they are. It is what one samples from. updates: how many there
    were before. The average is short at first, to forget the random weights."""
    decay = min(0.999, (1 + updates) / (10 + updates))
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)


def tokenizer_training_step(
    model, ema, optimizer, images, step, times=1, codebook_warmup=0, lpips=None, dinov2=None
) -> dict[str, Tensor]:
    """One step of the training of section 4 on images [B, 3, H, W]. train_tokenizer.py takes the
    same step with several processes and micro-batches, in bfloat16, starts the codebook from more
    images, and can be stopped."""
    batch = len(images)
    if step == codebook_warmup and codebook_warmup > 0:  # features become the codebook: B·N >= V
        model.quantize.start_from(model.encoder(images).flatten(0, 1))
        ema.quantize.load_state_dict(model.quantize.state_dict())
    code_noise = None
    if step < codebook_warmup:
        code_noise = torch.randn(batch, model.config.num_tokens, model.config.code_dim)
        code_noise = WARMUP_NOISE * code_noise.to(images.device)
    s = torch.rand(batch, times, device=images.device)
    out = model(images, s, code_noise=code_noise)
    repa_target = None if dinov2 is None else dinov2(images)
    terms = tokenizer_loss(out, images, lpips, repa_target=repa_target)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # Adam, betas (0.9, 0.95), rate 2e-4 that rises for the first 5000 steps
    update_ema(ema, model, step)
    return terms


# ------------------------------------------------------------------------------
# 6. Llama
#
# Our image is now 256 tokens, and the tokenizer is trained and stays as it is. A Llama learns to
# write such tokens: a decoder-only transformer as it is used for text, with RMSNorm, SwiGLU and
# RoPE along the sequence. In this chapter z_i is the number of token i. The Llama learns the
# probability of an image's tokens, each given the image's class y and the tokens before it:
#     p(z | y) = p(z_1 | y) p(z_2 | y, z_1) ... p(z_N | y, z_1, ..., z_{N-1})                 eq. 6
# Nothing in it knows about images. That is the point of D-AR: the order of the tokens is already
# right.
#     position                 0         1         2               N-1
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
        check_types(self)
        check_width("width", self.width)
        if self.layers < 1 or self.vocab_size < 1 or self.num_classes < 1 or self.num_tokens < 1:
            raise ValueError(f"{self}: a number is too small")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout = {self.dropout}: expected 0 ... 1")


AR_PRESETS = {
    "B": ARConfig(width=768, layers=12),  # 111M parameters
    "L": ARConfig(width=1024, layers=24),  # 343M
    "XL": ARConfig(width=1280, layers=36),  # 775M
    # Ours, for the tokenizers of the same name.
    "tiny": ARConfig(width=192, layers=6, vocab_size=1024, num_classes=10, num_tokens=64),
    "shapes": ARConfig(width=128, layers=3, vocab_size=64, num_classes=4, num_tokens=16),
    "cifar10": ARConfig(width=256, layers=5, vocab_size=1024, num_classes=10, num_tokens=64),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-5) · weight; the quotient is computed in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y.to(x.dtype) * self.weight


class LlamaAttention(nn.Module):
    """Multi-head attention with RoPE, and one projection for queries, keys and values."""

    def __init__(self, width: int):
        super().__init__()
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor, cache=None, position=None) -> Tensor:
        """x [B, n, C], rope [n, 32, 2], mask bool [n, m] -> [B, n, C]. In training m = n, and x
        attends to itself. Sampling gives a cache (chapter 7), and x attends to all that is in
        it."""
        q, k, v = self.wqkv(x).chunk(3, dim=-1)
        q = rotate(split_heads(q), rope)
        k = rotate(split_heads(k), rope)
        v = split_heads(v)
        if cache is not None:
            k, v = cache.update(k, v, position)
        return self.wo(merge_heads(attend(q, k, v, mask)))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with a hidden width of 8/3 C, rounded up to a multiple of 256."""

    def __init__(self, width: int):
        super().__init__()
        hidden = math.ceil((8 * width // 3) / 256) * 256
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.attention = LlamaAttention(width)
        self.feed_forward = SwiGLU(width)
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor, cache=None, position=None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache, position))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class ARTransformer(nn.Module):
    """p(z | y) of eq. 6. A loaded model may carry the tokenizer of its tokens, as `tokenizer`, and
    the names of its classes, as `class_names`."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config = config
        self.class_names: list[str] | None = None
        self.attach_tokenizer(None)
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)  # last: "no class"
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            LlamaBlock(config.width, config.dropout) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # all tokens start equally likely, the loss at log V

    def attach_tokenizer(self, tokenizer: SequentialDiffusionTokenizer | None) -> None:
        """Sets `tokenizer`. Raises ValueError if this model does not write its tokens."""
        if tokenizer is not None:
            check_same_tokens(self, tokenizer)
        # nn.Module would make an assigned module a part of this one, and its weights the Llama's.
        object.__setattr__(self, "tokenizer", tokenizer)

    def _apply(self, function, recurse=True) -> nn.Module:
        """What to() and its like do to each weight: the tokenizer comes along."""
        if self.tokenizer is not None:
            self.tokenizer._apply(function, recurse)
        return super()._apply(function, recurse)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Tokens int64 [B, n], classes int64 [B] -> embeddings [B, 1 + n, C], the class first."""
        classes = self.cls_embedding(labels)[:, None]
        return torch.cat((classes, self.tok_embeddings(codes)), 1)

    def transform(self, x: Tensor, position: Tensor, caches=None) -> Tensor:
        """Embeddings [B, n, C] at the positions int64 [n] -> hidden states [B, n, C], each of which
        has read what stands at positions up to its own. In training x is the whole sequence; a
        sampling step gives its end, and the rest is in the caches, one for each layer."""
        length = x.shape[1] if caches is None else caches[0].k.shape[2]
        rope = rope_1d(position)
        mask = causal_mask(position, length)
        x = self.dropout(x)
        for i, block in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = block(x, rope, mask, cache, position)
        return self.norm(x)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Tokens int64 [B, n], n <= N, classes int64 [B] -> logits float32 [B, n+1, V]; those at
        position i are of z_{i+1}, the token that comes next."""
        x = self.embed(codes, labels)
        position = torch.arange(x.shape[1], device=x.device)
        return self.output(self.transform(x, position)).float()

    def next_logits(self, x: Tensor, position: Tensor, caches: list["KVCache"]) -> Tensor:
        """A sampling step: embeddings [B, n, C] at the positions int64 [n] -> logits float32 [B, V]
        of the token after the last. The caches hold the positions before; these n are added."""
        x = self.transform(x, position, caches)
        return self.output(x[:, -1]).float()

    def new_caches(self, batch: int, length: int) -> list["KVCache"]:
        """For sampling, an empty cache for each layer."""
        shape = (batch, self.config.width // HEAD_DIM, length, HEAD_DIM)
        caches = []
        for _ in self.layers:
            k = self.output.weight.new_zeros(shape)
            v = self.output.weight.new_zeros(shape)
            caches.append(KVCache(k, v))
        return caches

    def generate(
        self, labels: Tensor, num_tokens=None, cfg=(1.1, 8.0), seeds=None, **sampling
    ) -> Tensor:
        """Draws tokens int64 [B, num_tokens] (default: N) for classes int64 [B]; call eval() first.
        The arguments, also greedy, prefix, temperature, top_k and top_p, are generate_groups'."""
        size = self.config.num_tokens if num_tokens is None else num_tokens
        groups = generate_groups(self, labels, size, num_tokens, cfg, seeds, **sampling)
        return torch.cat(list(groups), 1)


def check_same_tokens(ar: ARTransformer, tokenizer: SequentialDiffusionTokenizer) -> None:
    a = getattr(ar, "config", None)
    t = getattr(tokenizer, "config", None)
    if not hasattr(a, "vocab_size") or not hasattr(t, "codebook_size"):
        kinds = f"{type(ar).__name__} and {type(tokenizer).__name__}"
        raise ValueError(f"{kinds}: expected a Llama and a tokenizer, as the load_ functions give")
    if (a.vocab_size, a.num_tokens) != (t.codebook_size, t.num_tokens):
        raise ValueError(
            f"a Llama of {a.vocab_size} codes and {a.num_tokens} tokens, a tokenizer of "
            f"{t.codebook_size} and {t.num_tokens}: they do not belong together"
        )


def ar_loss(model: nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
    """Eq. 6 as a loss: the mean of -log p(z | y) / N, nats a token, for codes int64 [B, N] and
    classes int64 [B]. The model reads the class and all tokens but the last, and predicts all N."""
    logits = model(codes[:, :-1], labels)  # [B, N, V]
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def ar_training_step(model, optimizer, images, labels, class_dropout=0.1) -> Tensor:
    """One step of the training of section 4 on images [B, 3, H, W] of classes int64 [B], with the
    model's own tokenizer. The paper averages no weights here. train_ar.py takes the same step with
    several processes and micro-batches, in bfloat16, on tokens that it has computed once, and can
    be stopped."""
    codes = model.tokenizer.encode(images)  # [B, N]
    # Guidance (chapter 7) asks the model also without a class. So some images lose theirs.
    dropped = torch.rand(len(labels), device=labels.device) < class_dropout
    labels = labels.masked_fill(dropped, model.config.num_classes)
    loss = ar_loss(model, codes, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # AdamW, betas (0.9, 0.95), rate 4e-4, weight decay 0.05 of the matrices
    return loss


# ------------------------------------------------------------------------------
# 7. Sampling
#
# Guidance. Pictures look more like their class, at the price of variety, if the model is asked
# twice, with the class and without, and the difference of its logits is exaggerated:
#     without + scale (with - without)      scale 1: as it is; above 1: more of what a class changes
# In the paper the scale rises from the first token to the last. The first tokens decide the layout,
# and strong guidance would make all layouts alike; the last ones decide the details, and strong
# guidance makes these clean.
#
# Random numbers. All that is random in a picture comes from its own seed. So, but for rounding, a
# picture does not depend on the batch in which it is drawn, nor on how many processes share the
# work.


def guidance_schedule(
    cfg: float | tuple[float, float] | None, num_tokens: int
) -> list[float] | None:
    """The guidance scale of each of num_tokens tokens (Table 4): constant for a number; for a pair
    (start, end) linear from the first of them to the last. None, without guidance, if cfg is None
    or 1 throughout. Raises ValueError."""
    if cfg is None:
        return None
    pair = cfg if isinstance(cfg, tuple | list) else (cfg, cfg)
    numbers = [x for x in pair if isinstance(x, int | float) and math.isfinite(x)]
    if len(pair) != 2 or len(numbers) != 2:
        raise ValueError(f"guidance {cfg!r}: expected a number, a pair of numbers, or None")
    start, end = pair
    if start == end == 1:
        return None
    return [start + (end - start) * i / max(num_tokens - 1, 1) for i in range(num_tokens)]


def guide(logits: Tensor, scale: float) -> Tensor:
    """logits [2 B, V], the pictures with their class and then without -> guided logits [B, V]."""
    with_class, without = logits.chunk(2)
    return without + scale * (with_class - without)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """logits [B, V] / temperature; then -inf for all but the top_k likeliest tokens (0: all stay);
    then -inf for all but the likeliest tokens that together reach the probability top_p (1: all
    stay). Of equal logits the earlier token counts as the likelier."""
    logits = logits / temperature
    if top_k == 0 and top_p == 1:
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = -math.inf
    if top_p < 1:
        probability = ordered.softmax(-1)
        likelier = probability.cumsum(-1) - probability  # what the tokens before have together
        ordered = ordered.masked_fill(likelier >= top_p, -math.inf)
    return logits.scatter(-1, token, ordered)


def resolve_seeds(seeds: int | list[int] | None, count: int) -> list[int]:
    """A seed for each of count pictures: an int s means s, s+1, ...; None draws fresh ones. Raises
    ValueError."""
    if seeds is None:
        return torch.randint(2**31, (count,)).tolist()
    if isinstance(seeds, int):
        seeds = range(seeds, seeds + count)
    seeds = check_codes("seeds", seeds, 2**31, torch.device("cpu"), dims=1).tolist()
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures")
    return seeds


def picture_generators(seeds: list[int], purpose: int, device: torch.device):
    """Each picture's random numbers: for its noise x0 (purpose 0) and for its tokens (purpose 1).
    One generator for both would couple them: which tokens are likely would depend on the noise
    that they are to be decoded with."""
    return [torch.Generator(device).manual_seed(2 * seed + purpose) for seed in seeds]


def initial_noise(seeds: list[int], size: int, device: torch.device) -> Tensor:
    """x0 of eq. 3, each picture's from its own seed: float32 [B, 3, size, size]."""
    shape = (3, size, size)
    generators = picture_generators(seeds, 0, device)
    noise = [
        torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        for generator in generators
    ]
    return torch.stack(noise)


def gumbel_noise(seeds: list[int], vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """The noise that draws a token, float32 [B, V], for one token after another, each picture's
    from its own seed. To add Gumbel noise to logits and take the largest is to draw from
    softmax(logits); and -log of an exponentially distributed number is Gumbel noise."""
    generators = picture_generators(seeds, 1, device)
    shape = (len(seeds), 32, vocab_size)  # 32 tokens at a time
    exponential = torch.empty(shape, dtype=torch.float32, device=device)
    while True:
        for picture, generator in zip(exponential, generators):
            picture.exponential_(generator=generator)
        gumbel = -exponential.clamp_min(1e-38).log()  # some devices draw exact zeros
        yield from gumbel.transpose(0, 1)


# Cache. A token's keys and values never change once they are computed, since no token reads a later
# one. So they are kept, and sampling runs the Llama on each token only once:
#     step        input at position      reads the cache at    and draws
#     1           class at 0             0                     z_1
#     2           z_1 at 1               0 1                   z_2
#     ...
#     N           z_{N-1} at N-1         0 ... N-1             z_N
# The mask of such a step is one row of the causal mask (several rows at first, if a prefix is
# given). It hides the positions that are not written yet. These are filled with zeros: a hidden
# value counts with weight 0, but memory that was never written may hold inf, and 0 · inf is NaN.


class KVCache:
    """Keys and values of one attention layer, float [B, heads, length, 64] each."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k = k
        self.v = v

    def update(self, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, heads, n, 64] at the positions int64 [n]; returns all keys and values."""
        self.k.index_copy_(2, position, k.to(self.k.dtype))
        self.v.index_copy_(2, position, v.to(self.v.dtype))
        return self.k, self.v


def generate_groups(
    ar: ARTransformer,
    labels: Tensor,
    group_size: int,
    num_tokens: int | None = None,
    cfg: float | tuple[float, float] | None = (1.1, 8.0),
    seeds: int | list[int] | None = None,
    greedy: bool = False,
    prefix: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[Tensor]:
    """Draws num_tokens (default: N) tokens for classes [B], a tensor or a list (number num_classes:
    no class), and yields int64 [B, group_size] whenever a group is full. cfg: see
    guidance_schedule. seeds: see resolve_seeds. greedy: take the likeliest token. prefix: tokens
    [n] or [B, n] to keep as they are (section 5.1, zero-shot control). temperature, top_k, top_p:
    see filter_logits; they do not move the likeliest token. Raises ValueError, at once."""
    c = ar.config
    count = c.num_tokens if num_tokens is None else num_tokens
    if not isinstance(count, int) or not 1 <= count <= c.num_tokens:
        raise ValueError(f"num_tokens = {count}: expected 1 ... {c.num_tokens}")
    labels = check_codes("class labels", labels, c.num_classes + 1, ar.device, dims=1)
    numbers = isinstance(temperature, int | float) and isinstance(top_p, int | float)
    if not numbers or not temperature > 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected > 0 and in (0, 1]")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k = {top_k}: expected an integer, 0 or more")
    if c.dropout > 0 and ar.training:
        raise ValueError(f"the Llama is in training mode, with dropout {c.dropout}: call eval()")
    if prefix is None:
        prefix = labels.new_empty(len(labels), 0)
    prefix = torch.as_tensor(prefix, device=ar.device)
    if prefix.ndim == 1:
        prefix = prefix[None]
    prefix = check_codes("prefix tokens", prefix, c.vocab_size, ar.device)
    if len(prefix) not in (1, len(labels)) or prefix.shape[1] > count:
        shape = list(prefix.shape)
        raise ValueError(
            f"prefix {shape}: expected at most {count} tokens for {len(labels)} pictures"
        )
    prefix = prefix.expand(len(labels), -1)  # [B, n]
    scales = guidance_schedule(cfg, count)
    seeds = resolve_seeds(seeds, len(labels))

    classes = labels
    copies = 1
    if scales is not None:  # each picture twice: with its class, and without for guidance
        classes = torch.cat((labels, torch.full_like(labels, c.num_classes)))
        copies = 2

    @torch.no_grad()
    def draw() -> Iterator[Tensor]:
        codes = prefix  # [B, n], the tokens so far
        gumbel = gumbel_noise(seeds, c.vocab_size, labels.device)
        caches = ar.new_caches(len(classes), count)
        x = ar.embed(codes.repeat(copies, 1), classes)  # class and prefix are read at once
        position = torch.arange(x.shape[1], device=labels.device)
        for i in range(count):
            # Token i has noise number i, also where token i is given and needs none. So the tokens
            # after a prefix have the same noise whatever its length, and pictures with a longer and
            # a shorter prefix can be compared.
            noise = next(gumbel)  # [B, V]
            if i >= prefix.shape[1]:
                logits = ar.next_logits(x, position, caches)  # [copies · B, V]
                if scales is not None:
                    logits = guide(logits, scales[i])
                if not greedy:
                    logits = filter_logits(logits, temperature, top_k, top_p) + noise
                code = logits.argmax(-1, keepdim=True)  # [B, 1]
                codes = torch.cat((codes, code), 1)
                x = ar.tok_embeddings(code.repeat(copies, 1))  # to be read next: this one token
                position = position[-1:] + 1
            if (i + 1) % group_size == 0 or i + 1 == count:
                yield codes[:, i - i % group_size : i + 1]

    return draw()


# The flow's steps. Fig. 1: while the Llama writes, each finished group of tokens takes the picture
# one step on, and the velocity of that step gives a preview at no cost.
#
# The first tokens carry the layout. So the layout of a picture can be kept while the rest is drawn
# anew for some class (Fig. 6):
#     prefix = tokenizer.encode(image)[:, :32]        # image [1, 3, 256, 256] -> the first group
#     for step in stream(ar, tokenizer, labels=torch.tensor([207]), prefix=prefix):
#         show(step.preview)
# An eighth to a half of the tokens is worth trying: the fewer are kept, the more is left to the
# class.


class StreamStep(NamedTuple):
    """A picture once a further group of tokens is known. Images are float32 [B, 3, H, W], not
    clamped."""

    codes: Tensor  # int64 [B, n], the tokens so far
    x: Tensor  # x_t / data_scale; after the last group this is the picture
    previews: tuple[Tensor, ...]  # the jump estimate of each step of the flow so far

    @property
    def preview(self) -> Tensor:
        return self.previews[-1]  # there is one: the flow's first step needs the first group


def denoise(
    tokenizer, code_groups: Iterable[Tensor], noise: Tensor, num_steps=None, solver="ab2"
) -> Iterator[StreamStep]:
    """Eq. 8: takes each step of the flow as soon as the group of tokens that it needs is there.
    code_groups: up to K groups, int64 [B, N/K], in order. noise: x0 [B, 3, H, W]. num_steps: S, the
    config's if None. Yields a StreamStep for each group. Raises ValueError, at once."""
    c = tokenizer.config
    if num_steps is None:
        num_steps = c.num_steps or c.num_groups
    schedule = sampling_schedule(num_steps, c.num_groups, c.time_shift, c.group_rule)
    solver_step(noise, noise, None, 0.0, solver)  # refuses an unknown solver now

    @torch.no_grad()
    def steps() -> Iterator[StreamStep]:
        x = noise.float()
        v_prev = None
        previews = ()
        codes = None
        for k, group_codes in enumerate(code_groups):
            codes = group_codes if codes is None else torch.cat((codes, group_codes), 1)
            # The causal decoder runs anew on all tokens so far. A cache would spare it the earlier
            # ones, but it is small beside the diffusion decoder (v1: 256 tokens, 1024 patches).
            group_z = tokenizer.condition(codes)[:, -c.group_size :]  # z' of group k
            for step in schedule:
                if step.group == k:
                    t = torch.tensor([step.t], dtype=torch.float32, device=x.device)
                    v = tokenizer.velocity(x, t, group_z)
                    previews = (*previews, jump_estimate(x, v, t) / c.data_scale)
                    x = solver_step(x, v, v_prev, step.t_next - step.t, solver)
                    v_prev = v
            yield StreamStep(codes, x / c.data_scale, previews)

    return steps()


def decode_steps(tokenizer, codes, noise, num_steps, solver) -> list[StreamStep]:
    """decode() and previews(): the flow for tokens that are all there, int64 [B, n]."""
    c = tokenizer.config
    codes = check_codes("codes", codes, c.codebook_size, tokenizer.device)
    count = codes.shape[1]
    if len(codes) == 0 or count == 0 or count > c.num_tokens or count % c.group_size != 0:
        raise ValueError(
            f"codes {list(codes.shape)}: expected whole groups of {c.group_size}, up to "
            f"{c.num_tokens} tokens, for one image or more"
        )
    if noise is None:
        shape = (len(codes), 3, c.image_size, c.image_size)
        noise = torch.randn(shape, dtype=torch.float32, device=codes.device)
    check_images(noise, c.diffusion_patch)
    if len(noise) != len(codes):
        raise ValueError(f"noise for {len(noise)} pictures, codes for {len(codes)}")
    groups = codes.split(c.group_size, 1)
    return list(denoise(tokenizer, groups, noise, num_steps, solver))


def stream(
    ar,
    tokenizer,
    labels,
    cfg=(1.1, 8.0),
    seeds=None,
    noise=None,
    num_steps=None,
    solver="ab2",
    **sampling,
) -> Iterator[StreamStep]:
    """Section 3.3: yields a StreamStep after each group of N/K tokens. The x of the last one is the
    finished picture, the same as decode(codes, noise). noise: x0, from each picture's seed if None.
    num_steps, solver: denoise's. labels, cfg, seeds and the rest (greedy, prefix, temperature,
    top_k, top_p): generate_groups'. Raises ValueError, at once."""
    check_same_tokens(ar, tokenizer)
    c = tokenizer.config
    labels = check_codes("class labels", labels, ar.config.num_classes + 1, ar.device, dims=1)
    if len(labels) == 0:
        raise ValueError("no class labels: expected one or more")
    seeds = resolve_seeds(seeds, len(labels))
    if noise is None:
        noise = initial_noise(seeds, c.image_size, tokenizer.device)
    check_images(noise, c.diffusion_patch)
    if len(noise) != len(labels):
        raise ValueError(f"noise for {len(noise)} pictures, labels for {len(labels)}")
    groups = generate_groups(ar, labels, c.group_size, cfg=cfg, seeds=seeds, **sampling)
    return denoise(tokenizer, groups, noise, num_steps, solver)


# ------------------------------------------------------------------------------
# 8. Weights in files
#
# Ours are dicts of plain data and tensors:
#     "format", "kind"   "dar-1"; "tokenizer" or "ar"
#     "config"           the fields of TokenizerConfig or ARConfig
#     "model", "ema"     weights, and perhaps averaged ones, which loading prefers
#     "tokenizer"        in a Llama's, perhaps: the same for its tokenizer
#     "class_names"      in a Llama's, perhaps: a list of words
#     "training"         perhaps: what going on with a training needs
# A file without "format" is the authors': its weights are renamed, sizes are read from their
# shapes, the rest from its settings. Either way a file is data: nothing in it can run.

FORMAT = "dar-1"

# The authors' names, also as DDP and torch.compile leave them, and ours.
RENAMED = {
    r"^((module|_orig_mod)\.)+": "",
    r"^quant_(in|out)_conv\.": r"quant_\1.",
    r"^diff_decoder\.net\.": "diffusion.",
    r"\.conv_(in|out)\.": r".patch_\1.",
    r"\.repa_out\.": ".repa_head.",
    r"\.embedding_table\.": ".",
}


def read_checkpoint(path: str | Path) -> dict:
    """The dict in a .pt file, its tensors mapped into memory and read when they are used. Raises
    OSError, or ValueError: damaged, or holding code."""
    # The authors' files name two classes, of which only what they hold is wanted.
    stand_ins = [
        (types.SimpleNamespace, "argparse.Namespace"),
        (types.SimpleNamespace, "config_util.Config"),
    ]
    open(path, "rb").close()  # raises OSError if the file is missing or may not be read
    try:
        # torch would map compressed bytes as if they were not.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail in any way
        code = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if code and "weights_only" in str(error):
            raise ValueError(f"{path}: refused, for it holds {code[1]}, which could run") from None
        raise ValueError(f"{path}: damaged, compressed or of old torch; copy it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, expected a dict")
    return data


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    ema: nn.Module | None = None,
    training: dict | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a tokenizer, or a Llama with its tokenizer and class names, in dtype (their own if
    None). ema: the same model with averaged weights. training: plain data for going on."""
    data = checkpoint_dict(model, dtype)
    if ema is not None:
        data["ema"] = checkpoint_dict(ema, dtype)["model"]
    if training is not None:
        data["training"] = training
    if data["kind"] == "ar" and model.tokenizer is not None:
        data["tokenizer"] = checkpoint_dict(model.tokenizer, dtype)
    if data["kind"] == "ar" and model.class_names is not None:
        data["class_names"] = list(model.class_names)
    torch.save(data, path)


def checkpoint_dict(model: nn.Module, dtype: torch.dtype | None) -> dict:
    kind = "ar" if isinstance(model, ARTransformer) else "tokenizer"
    weights = {
        name: weight.detach().to("cpu", dtype) for name, weight in model.state_dict().items()
    }
    config = dataclasses.asdict(model.config)
    return {"format": FORMAT, "kind": kind, "config": config, "model": weights}


def load_tokenizer(path, device="cpu", dtype=None) -> SequentialDiffusionTokenizer:
    """A tokenizer from our format or the authors', or the one that a Llama's file carries; in eval
    mode. Raises OSError, ValueError or FloatingPointError, naming the file."""
    data = read_checkpoint(path)
    if data.get("kind") == "ar" and isinstance(data.get("tokenizer"), dict):
        data = data["tokenizer"]
    return load_model(SequentialDiffusionTokenizer, data, path, device, dtype)


def load_ar(path, device="cpu", dtype=None, tokenizer=None, num_tokens=None) -> ARTransformer:
    """A Llama from our format or the authors', in eval mode, with the tokenizer that its file
    carries, or that is given, as a model or a path. num_tokens: N, which the authors' files do not
    tell, where no tokenizer tells it (default: 256). Raises OSError, ValueError or
    FloatingPointError."""
    data = read_checkpoint(path)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, device, dtype)
    if tokenizer is None and isinstance(data.get("tokenizer"), dict):
        inner = data["tokenizer"]
        tokenizer = load_model(SequentialDiffusionTokenizer, inner, path, device, dtype)
    if tokenizer is not None:
        num_tokens = tokenizer.config.num_tokens
    ar = load_model(ARTransformer, data, path, device, dtype, num_tokens or 256)
    try:
        ar.attach_tokenizer(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = data.get("class_names")
    if names is not None:
        if not isinstance(names, list) or len(names) != ar.config.num_classes:
            raise ValueError(f"{path}: class_names is no list of {ar.config.num_classes} names")
        ar.class_names = [str(name) for name in names]
    return ar


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(model_class, data: dict, path, device, dtype, num_tokens: int = 256) -> nn.Module:
    """The model in the dict of a file. num_tokens: N of a Llama of the authors'."""
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in [None, *DTYPES.values()]:
        raise ValueError(f"dtype {dtype}: expected {', '.join(DTYPES)}, or None for the file's")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r}: expected cpu, cuda, mps or a torch.device") from None
    kind = "ar" if model_class is ARTransformer else "tokenizer"
    if data.get("kind", kind) != kind:
        raise ValueError(f"{path}: holds a model of kind {data['kind']!r:.40}, expected {kind!r}")
    if data.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path}: format {data['format']!r:.40}, expected {FORMAT!r}")
    try:
        state = find_weights(data)
        if "format" in data:
            config_class = ARConfig if kind == "ar" else TokenizerConfig
            config = config_class(**data["config"])
        elif kind == "ar":
            config = released_ar_config(state, num_tokens)
        else:
            config = released_tokenizer_config(data.get("config"), state)
        with torch.device("meta"):  # shapes alone: no time and no memory goes to random weights
            model = model_class(config)
        model.load_state_dict(state, assign=True)  # checks all names and shapes
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: no {model_class.__name__} ({reason:.1000})") from None
    for name, weight in state.items():
        state[name] = weight.to(device, dtype, copy=True)  # out of the mapped file
        if not state[name].float().isfinite().all():
            raise FloatingPointError(f"{path}: {name} is not finite, as after a failed training")
    model.load_state_dict(state, assign=True)
    return model.eval()


def find_weights(data: dict) -> dict[str, Tensor]:
    """The weights under our names, averaged ones if there are any."""
    weights = data  # a bare state dict
    for part in ("model", "ema"):
        if isinstance(data.get(part), dict):
            weights = data[part]
    state = {}
    for name, value in weights.items():
        for theirs, ours in RENAMED.items():
            name = re.sub(theirs, ours, name)
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is sparse or empty")
        if name.startswith(("quant_", "diffusion.patch_")) and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # the authors' 1x1 convolutions are our Linears
        state[name] = value
    state.pop("quantize.codebook_used", None)  # the authors' count of used codes, no weight
    return state


def released_ar_config(state: dict, num_tokens: int) -> ARConfig:
    vocab_size, width = state["tok_embeddings.weight"].shape
    return ARConfig(
        width=width,
        layers=count_layers(state, "layers."),
        vocab_size=vocab_size,
        num_classes=len(state["cls_embedding.weight"]) - 1,
        num_tokens=num_tokens,
    )


def released_tokenizer_config(config: object, state: dict) -> TokenizerConfig:
    """Sizes from the shapes of the weights; N, K, S, beta and data scale from the authors' config,
    a dict in a Config object, where there is one, and v1's otherwise. Raises ValueError on
    settings that the authors never released."""
    if isinstance(config, types.SimpleNamespace):
        config = config._data
    if config is None:
        config = {}
    config = config.get("model", config)
    diffusion = config.get("diff_decoder", {})
    for name, ours in {"vq_enable": True, "mlp_head": False, "share_time_encoding": False}.items():
        if config.get(name, diffusion.get(name, ours)) != ours:
            raise ValueError(f"{name} is not {ours}")
    encoder_width, _, encoder_patch, _ = state["patchify.weight"].shape
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    max_tokens, decoder_width = state["decoder_embedding.weight"].shape
    diffusion_width, pixels = state["diffusion.patch_in.weight"].shape
    diffusion_layers = count_layers(state, "diffusion.blocks.")
    repa_layer = None
    if "diffusion.repa_head.0.weight" in state:
        repa_layer = diffusion.get("repa_layer", min(8, diffusion_layers - 1))
    return TokenizerConfig(
        encoder_patch=encoder_patch,
        encoder_width=encoder_width,
        encoder_layers=count_layers(state, "encoder_layers."),
        decoder_width=decoder_width,
        decoder_layers=count_layers(state, "decoder_layers."),
        num_tokens=config.get("num_all_queries", 256),
        num_groups=config.get("num_query_groups", 8),
        codebook_size=codebook_size,
        code_dim=code_dim,
        diffusion_patch=math.isqrt(pixels // 3),
        diffusion_width=diffusion_width,
        diffusion_layers=diffusion_layers,
        num_steps=config.get("num_denoising_steps", 0),
        time_shift=diffusion.get("time_shift", 2.0),
        data_scale=diffusion.get("data_std", 0.6),
        group_rule="nearest",
        repa_layer=repa_layer,
        max_tokens=max_tokens,
    )


def count_layers(state: dict, prefix: str) -> int:
    """How many layers have weights under names that begin with prefix: "layers.0.", "layers.1."."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)]
    return len(set(numbers))
