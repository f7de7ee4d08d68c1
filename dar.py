"""D-AR in one file: diffusion as next-token prediction (Gao & Shou, "D-AR: Diffusion via Autoregressive Models",
arXiv 2505.23660), from the time schedule to the training loop's plumbing, in the order in which one would teach it.

    chapter               what                                         where the paper has it
    1  Schedule and flow  shift_time, condition_group, interpolate     eq. 3-5
                          sampling_schedule, solver_step               eq. 8, Table 2 (Euler, Adams 2nd)
    2  Quantizer          VectorQuantizer                              eq. 1, appendix I "Vector quantization"
    3  Attention          rope_1d, rope_2d, Attention, GatedBlock      section 4, appendix I "Transformer architecture"
    4  Diffusion decoder  DiffusionBlock, DiffusionDecoder             eq. 2, Fig. 4, section 4
    5  Tokenizer          SequentialDiffusionTokenizer, presets        Fig. 4, eq. 1, 2 and 7, Tables 1, 6, 7
                          denoise, decode, previews                    section 3.3, section 5.1, Fig. 5, Table 5
    6  Llama              ARTransformer, presets                       section 3.2 (eq. 6), section 4 "AR models"
    7  Generation         generate_groups, guidance_schedule           section 5, Table 4
    8  Streaming          stream                                       Fig. 1, section 3.3 "Streaming pixel decoding"
    9  Checkpoints        load_tokenizer, load_ar, save_checkpoint     (the authors' released files, and ours)
    10 Plumbing           what both trainings and the scripts share    section 5 "Experimental Setup"

Names are the paper's: x0 is noise, x1 the image, t = 0 noise and t = 1 data; N tokens in K groups. In shape comments
B is the batch, C a width, P the number of patches, V the codebook size.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import typing
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

HEAD_DIM = 64  # every attention of both models has heads of 64
EPS = 1e-6  # of every LayerNorm

# ----------------------------------------------------------------------------------------------------------------------
# 1. Schedule and flow
# Flow matching (eq. 3, 4) moves along straight lines from noise x0 to an image x1; a network learns the velocity.
# D-AR's own idea is *which tokens the network sees when*: time is cut into K pieces, and piece k belongs to the k-th
# group of tokens alone (eq. 5). The pieces are equal in a uniform time s (the paper's t'), not in t: t = shift_time(s)
# spends more of them, and so more tokens, on early times, where pictures are noisy and their layout is decided.


def shift_time(s: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 8: uniform s in [0, 1] -> flow time t = s / (s + beta (1 - s)) in [0, 1]; beta > 1 makes early t denser."""
    return s / (s + beta * (1 - s))


def unshift_time(t: Tensor | float, beta: float) -> Tensor | float:
    """Eq. 5: flow time t in [0, 1] -> t' = t / (t + (1 - t) / beta), which is the s that shift_time maps to t."""
    return t / (t + (1 - t) / beta)


def condition_group(s: Tensor | float, num_groups: int, rule: str = "ceil") -> Tensor | int:
    """Eq. 5: which group of tokens, 0 ... K-1, conditions the flow at uniform time s in [0, 1].
    "ceil" gives each group one K-th of s: the paper's one-based ceil(s K), taken at an edge s = i/K as the interval
    that a sampling step from there is about to cross (the paper's formula names the one just left, and none at 0).
    "nearest" is min(floor(s K + 1/2), K-1), which the released weights were trained with: the first group owns half a
    K-th, the last one and a half. At s = i/K both give i; a t turned back into s may miss such edges by rounding.
    s: float tensor -> int64 tensor of its shape, or a number -> int. Raises ValueError on an unknown rule."""
    check_group_rule(rule)
    if rule == "ceil":
        return _interval(s, num_groups, num_groups - 1)
    # nearest: the edges (i - 1/2)/K are every second edge of a grid twice as fine
    return (_interval(s, 2 * num_groups, 2 * num_groups - 2) + 1) // 2


def check_group_rule(rule: str) -> None:
    """Raises ValueError unless the rule is one that condition_group knows."""
    if rule not in ("ceil", "nearest"):
        raise ValueError(f"group rule {rule!r}: expected 'ceil' (paper, eq. 5) or 'nearest' (released weights)")


def _interval(s: Tensor | float, n: int, last: int) -> Tensor | int:
    """The largest i <= last with i/n <= s, where i/n is rounded as s is: (1/49)·49 < 1 must not lose the edge 1/49."""
    if not isinstance(s, Tensor):
        return int(_interval(torch.tensor(s, dtype=torch.float64, device="cpu"), n, last))
    i = (s * n).floor()
    i = i + ((i + 1) / n <= s).to(i.dtype) - (i / n > s).to(i.dtype)
    return i.long().clamp(0, last)


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Eq. 3: x_t = t x1 + (1 - t) x0, for noise x0 and data x1 [B, ...] and times t [B]."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def jump_estimate(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """Section 5.1: from x_t straight to the data, x1 = x_t + (1 - t) v_t; a preview is this. t: [B] or number."""
    if isinstance(t, Tensor):
        t = t.view(-1, *[1] * (x_t.ndim - 1))
    return x_t + (1 - t) * velocity


def sampling_schedule(num_steps: int, num_groups: int, beta: float, rule: str) -> list[tuple[float, float, int]]:
    """Eq. 8: the S sampling steps as (t_i, t_{i+1}, group): s_i = i/S, t_i = shift_time(s_i), the group from s_i.
    With S = K, the paper's default, each group is used exactly once. With S < K some groups are passed over, with
    S > K some serve several steps. Raises ValueError if num_steps < 1."""
    if num_steps < 1:
        raise ValueError(f"{num_steps} sampling steps: expected at least 1")
    t = [shift_time(i / num_steps, beta) for i in range(num_steps + 1)]
    return [(t[i], t[i + 1], condition_group(i / num_steps, num_groups, rule)) for i in range(num_steps)]


def solver_step(x: Tensor, v: Tensor, v_prev: Tensor | None, h: float, solver: str) -> Tensor:
    """One ODE step of length h from x with velocity v there; v_prev is the step before's velocity (None at the first).
    "euler": x + h v. "ab2", two-step Adams-Bashforth (Table 2, "Adams 2nd"): x + h (3/2 v - 1/2 v_prev), first step
    Euler; as in the paper, with the weights of equal steps, which the shifted ones are not. ValueError otherwise."""
    if solver not in ("euler", "ab2"):
        raise ValueError(f"solver {solver!r}: expected 'euler' or 'ab2'")
    if solver == "ab2" and v_prev is not None:
        v = 1.5 * v - 0.5 * v_prev
    return x + h * v


# ----------------------------------------------------------------------------------------------------------------------
# 2. Quantizer
# A token is the index of the codebook row nearest to a feature vector. Both live on the unit sphere (appendix I), where
# the nearest row is simply the one with the largest inner product.


class VectorQuantizer(nn.Module):
    """l2-normalised vector quantizer (eq. 1; appendix I, after LlamaGen): V codes of dimension D, all in float32."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)  # N(0, 1) rows: uniform directions once normalised

    def codebook(self) -> Tensor:
        """The rows that are compared and passed on: float32 [V, D] of length one."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [...] in 0 ... V-1 -> their unit vectors, float32 [..., D]."""
        return F.normalize(F.embedding(codes, self.embedding.weight).float(), dim=-1)

    @torch.no_grad()
    def nearest(self, f: Tensor) -> Tensor:
        """float [..., D], of any length -> int64 [...] indices of the nearest codes."""
        with torch.autocast(f.device.type, enabled=False):
            flat, codebook = f.float().reshape(-1, f.shape[-1]), self.codebook()
            rows = max(1, 2**26 // len(codebook))  # at once, so that no buffer of products passes 256 MB
            codes = [(chunk @ codebook.T).argmax(-1) for chunk in flat.split(rows)]
        return torch.cat(codes).view(f.shape[:-1])

    def forward(self, f: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [B, N, D] -> (z [B, N, D], codes int64 [B, N], vq loss, commitment loss).
        z has the value of the nearest codes and, straight through, the gradient of the normalised features. The
        losses (appendix I, without their weights) pull the codes to the features, ||sg[f] - z||^2, and the features
        to their codes, ||f - sg[z]||^2: the mean over D, then over the tokens where keep (bool [B, N]) is true."""
        f = F.normalize(f.float(), dim=-1)
        codes = self.nearest(f)
        z = self.lookup(codes)
        weight = torch.ones_like(f[..., 0]) if keep is None else keep.to(f.dtype)
        errors = ((f.detach() - z) ** 2).mean(-1), ((f - z.detach()) ** 2).mean(-1)
        vq, commit = (error.mul(weight).sum() / weight.sum() for error in errors)
        return f + (z - f).detach(), codes, vq, commit


# ----------------------------------------------------------------------------------------------------------------------
# 3. Attention and blocks
# One attention for the whole tokenizer: LayerNorm on queries and keys of each head, then a rotary embedding (RoPE)
# where tokens have a place in the image, then scaled dot products (appendix I).


@functools.cache  # built once for each size, not once a call; never dropped, since a CUDA graph may read it (Replayed)
@torch.inference_mode(False)  # a table first asked for under inference_mode must still be usable in a training step
def rope_1d(length: int, device: torch.device) -> Tensor:
    """Rotations of places n < length, float32 [length, 32, 2] of (cos, sin): pair i turns by n·10000^(-2i/64)."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack((angles.cos(), angles.sin()), -1)


@functools.cache
@torch.inference_mode(False)
def rope_2d(height: int, width: int, num_unplaced: int, device: torch.device) -> Tensor:
    """Rotations of a height x width patch grid in row-major order, float32 [height·width + num_unplaced, 32, 2].
    The first half of a head turns by the row, the second by the column, each with frequencies 10000^(-2i/32). The
    num_unplaced tokens that follow have no place in the image and are not turned (appendix I: identity)."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM // 2, 2, device=device) / (HEAD_DIM // 2))
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    angles = torch.cat((row[:, None] * frequency, column[:, None] * frequency), -1)  # [P, 32]
    angles = F.pad(angles, (0, 0, 0, num_unplaced))
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns adjacent pairs of x [..., n, 64] by rope [n, 32, 2], in float32. As complex numbers, (a + ib)(cos + i sin),
    that is one pass over x instead of seven. torch.compile knows no complex numbers, but fuses the seven itself."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Keys and values of the tokens that one attention layer has seen: buffers allocated once, filled from the left."""

    @torch.inference_mode(False)
    def __init__(self, batch: int, heads: int, length: int, device: torch.device, dtype: torch.dtype):
        self.k, self.v = torch.zeros(2, batch, heads, length, HEAD_DIM, device=device, dtype=dtype)
        self.filled = 0

    def clear(self) -> None:
        """Forgets all tokens. Zeros, since what a mask hides has weight 0, and 0 times inf would be no number."""
        self.k.zero_(), self.v.zero_()
        self.filled = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [B, heads, n, 64] and returns all keys and values so far, [B, heads, filled, 64]."""
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.k[:, :, start : self.filled], self.v[:, :, start : self.filled] = k, v
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled]

    def put(self, k: Tensor, v: Tensor, place: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes one token's k, v [B, heads, 1, 64] to its place, int64 [1], and returns the first `length` of all: a
        mask must hide those to come. The place is a tensor, so that one recording serves them all (Replayed)."""
        self.k.index_copy_(2, place, k.to(self.k.dtype)), self.v.index_copy_(2, place, v.to(self.v.dtype))
        return self.k[:, :, :length], self.v[:, :, :length]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / 8) v for queries [B, heads, n, 64] and keys and values [B, heads, m, 64].
    mask: bool [n, m], true = may attend. causal: the n queries stand at the last n of the m >= n keys' places and see
    none after their own. In bfloat16 on a CPU, without gradients it is written out, 2 to 9 times as fast as torch's."""
    n, m = q.shape[-2], k.shape[-2]
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if causal and n > 1 and (plain or n < m):
        mask, causal = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n), False
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and n > 1)
    if n == 1:  # matrix times vector reads the keys of a cache as they lie; the loop below copies them
        scores = (k @ q.transpose(-1, -2) / HEAD_DIM**0.5).transpose(-1, -2)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v
    q, k, v, parts = q / HEAD_DIM**0.5, k.transpose(-1, -2).contiguous(), v.contiguous(), []
    for i in range(0, n, 128):  # queries at a time: their scores stay in the processor's cache
        scores = q[:, :, i : i + 128] @ k
        if mask is not None:
            scores = scores.masked_fill(~mask[i : i + 128], -math.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2)


class Attention(nn.Module):
    """Multi-head attention with QK normalisation, to itself or to a context."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_DIM, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor, context=None, rope=None, mask=None, causal=False, cache=None) -> Tensor:
        """x [B, n, C] attends to itself, or to context [B, m, C]; -> [B, n, C].
        rope [n, 32, 2] turns the queries, and the keys too unless they come from a context. mask (bool [n, n], true
        = may attend) and causal exclude each other; a cache implies causal, and x then follows what it holds."""
        source = x if context is None else context
        q = self.q_norm(self.q(x).unflatten(-1, (-1, HEAD_DIM))).transpose(1, 2)  # [B, heads, n, 64]
        k = self.k_norm(self.k(source).unflatten(-1, (-1, HEAD_DIM))).transpose(1, 2)
        v = self.v(source).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, rope), (rotate(k, rope) if context is None else k)
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may have left the norms in float32
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.proj(attend(q, k, v, mask, causal or cache is not None).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear - SiLU - Linear with a hidden width of 4 C."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class GatedBlock(nn.Module):
    """Pre-norm block of encoder and causal decoder; learned gates scale its branches, so that it begins as identity."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = Attention(width), MLP(width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.gate1, self.gate2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))  # zero-initialised

    def forward(self, x: Tensor, rope=None, mask=None, causal=False, cache=None) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope=rope, mask=mask, causal=causal, cache=cache)
        return x + self.gate2 * self.mlp(self.norm2(x))


def normalize(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def init_linears(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights of standard deviation std and zero biases in every Linear (and patch convolution)."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool, *args, caches=None, **kwargs) -> Tensor:
    """x through the blocks, each with its own of the KV caches if there are any. With recompute, activations are
    computed again in the backward pass instead of kept: less memory, more time."""
    for i, block in enumerate(blocks):
        if caches is not None:
            kwargs["cache"] = caches[i]
        if recompute and torch.is_grad_enabled():
            x = recompute_in_backward(block, x, *args, use_reentrant=False, **kwargs)
        else:
            x = block(x, *args, **kwargs)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# 4. Diffusion decoder
# A diffusion transformer on raw pixel patches (Fig. 4, right). It differs from DiT in one place: the modulation of
# AdaLN-zero is not one vector for the picture but one for each patch, because what conditions a patch is what that
# patch reads from the step's group of tokens by cross-attention.


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 t for flow times t [B] in [0, 1]: float32 [B, width], cosines first."""
    frequency = 10000.0 ** (-torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000 * t.float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimeEmbedding(nn.Module):
    """Sinusoids, then Linear - SiLU - Linear: t [B] -> [B, C]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weight = self.mlp[0].weight
        return self.mlp(time_embedding(t, weight.shape[1]).to(weight.dtype))


class DiffusionBlock(nn.Module):
    """DiT block with AdaLN-zero from cross-attention (section 4, "Sequential diffusion tokenizer architecture")."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.cross_attn, self.mlp = Attention(width), Attention(width), MLP(width)
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """Patches x [B, P, C], times t [B] or [1], condition tokens [B, n, C], rope [P, 32, 2] -> [B, P, C]."""
        context = normalize(self.cond_embed(condition))
        normal = normalize(x)
        read = self.cross_attn(normal, context=context, rope=rope)  # [B, P, C]: not added to x, it only modulates
        modulation = self.adaLN_modulation(read + self.time_embed(t)[:, None])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, -1)
        # addcmul(a, b, c) is a + b c in one pass over the patches instead of two
        x = torch.addcmul(x, gate_a, self.attention(torch.addcmul(shift_a, normal, 1 + scale_a), rope=rope))
        return torch.addcmul(x, gate_m, self.mlp(torch.addcmul(shift_m, normalize(x), 1 + scale_m)))


class DiffusionDecoder(nn.Module):
    """D_FM of eq. 2: the velocity at (x_t, t) given a group of z'. With a repa_layer, the state that enters that
    block also goes through the REPA head (eq. 7), whose output the training compares to DINOv2's patch features."""

    REPA_GRID, REPA_WIDTH, REPA_HIDDEN = 16, 768, 2048  # DINOv2 ViT-B/14 sees 224 pixels: 16x16 features of width 768

    def __init__(self, width: int, cond_width: int, depth: int, patch_size: int, repa_layer: int | None, init_std=0.02):
        super().__init__()
        self.patch_size, self.repa_layer, self.recompute = patch_size, repa_layer, False
        self.cond_mlp = nn.Linear(cond_width, width)
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.patch_out = nn.Linear(width, 3 * patch_size**2)
        if repa_layer is not None:
            h, o = self.REPA_HIDDEN, self.REPA_WIDTH
            self.repa_head = nn.Sequential(nn.Linear(width, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, o))
        init_linears(self, init_std)
        nn.init.zeros_(self.patch_out.weight)  # zero-initialised: the first velocity is 0
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)  # zero-initialised: blocks begin as the identity

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, repa: bool = False) -> tuple[Tensor, Tensor | None]:
        """x_t [B, 3, H, W], t [B] or [1] (one time for all), condition z' [B, n, cond_width].
        -> velocity, float32 [B, 3, H, W]; and with repa the REPA head's features [B, g·g, 768], g at most 16."""
        size, dtype = self.patch_size, self.patch_in.weight.dtype
        height, width = x_t.shape[2] // size, x_t.shape[3] // size
        rope = rope_2d(height, width, 0, x_t.device)
        condition = normalize(self.cond_mlp(condition))
        patches = F.pixel_unshuffle(x_t, size).flatten(2).transpose(1, 2)  # [B, P, 3·size²] in the order (c, row, col)
        x = self.patch_in(patches.to(dtype))
        split = self.repa_layer if repa else 0
        x = run_blocks(self.blocks[:split], x, self.recompute, t, condition, rope)
        features = self.repa_features(x, height, width) if repa else None
        x = run_blocks(self.blocks[split:], x, self.recompute, t, condition, rope)
        out = self.patch_out(normalize(x)).float()
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), size), features

    def repa_features(self, x: Tensor, height: int, width: int) -> Tensor:
        """Hidden state [B, height·width, C] -> [B, g·g, 768]: averaged to 16x16 where larger, kept where smaller."""
        grid = x.transpose(1, 2).unflatten(2, (height, width))
        pooled = F.adaptive_avg_pool2d(grid, (min(height, self.REPA_GRID), min(width, self.REPA_GRID)))
        return self.repa_head(pooled.flatten(2).transpose(1, 2))


# ----------------------------------------------------------------------------------------------------------------------
# 5. Tokenizer
# Image -> encoder -> quantizer -> 256 codes -> causal decoder -> z' -> diffusion decoder -> image (Fig. 4). The codes
# are what the Llama of chapter 6 learns to predict; everything to their right runs left to right, group by group.


def _check_fields(config, may_be_zero: tuple[str, ...]) -> None:
    """Raises ValueError naming a field that is no positive number of its type or, for widths, not whole heads."""
    for field in dataclasses.fields(config):
        value, number = getattr(config, field.name), (int, float) if field.type is float else int
        if field.type is str or (value is None and field.type == int | None):
            continue
        zero = field.name in may_be_zero
        fits = isinstance(value, number) and not isinstance(value, bool) and 0 <= value < 2**31
        if not fits or value == 0 and not zero:
            wanted = f"{'a number' if field.type is float else 'an integer'} {'from' if zero else 'above'} 0"
            raise ValueError(f"{field.name} = {value!r}: expected {wanted}, below 2**31")
        if field.name.endswith("width") and value % HEAD_DIM:
            raise ValueError(f"{field.name} = {value}: expected a multiple of {HEAD_DIM}, the width of a head")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """All that shapes a tokenizer; the defaults are "v1", the paper's. Raises ValueError on what cannot be built."""

    image_size: int = 256  # pixels a side that decode() draws when it is given no noise
    encoder_patch: int = 16  # pixels a side (p in section 4)
    encoder_width: int = 768
    encoder_layers: int = 8
    decoder_width: int = 768  # causal decoder, and so of z'
    decoder_layers: int = 8
    num_tokens: int = 256  # N
    num_groups: int = 8  # K
    codebook_size: int = 16384
    code_dim: int = 8
    diffusion_patch: int = 8  # p_d
    diffusion_width: int = 768
    diffusion_layers: int = 12
    num_steps: int = 0  # sampling steps S; 0 means S = K, as in eq. 8
    time_shift: float = 2.0  # beta of eq. 5 and 8
    data_scale: float = 0.6  # x1 = data_scale · image; 1 in the paper's eq. 4, 0.6 in its released weights
    group_rule: str = "ceil"  # eq. 5; "nearest" is what the released weights were trained with (condition_group)
    repa_layer: int | None = 8  # REPA reads the state entering this diffusion block; None: no REPA head
    commit_weight: float = 0.25  # beta of appendix I
    init_std: float = 0.02  # of fresh Linears; narrow models start faster with 1/sqrt(width), which 0.02 is far below
    max_tokens: int = 1024  # rows of the query and position tables, of which the first N are used

    def __post_init__(self):
        optional = ("num_steps", "repa_layer", "commit_weight", "encoder_layers", "decoder_layers")
        _check_fields(self, may_be_zero=optional)
        for name in ("encoder_patch", "diffusion_patch"):
            if self.image_size % getattr(self, name):
                raise ValueError(f"image size {self.image_size} is no multiple of {name} = {getattr(self, name)}")
        if self.num_tokens % self.num_groups:
            raise ValueError(f"N = {self.num_tokens} tokens do not divide into K = {self.num_groups} equal groups")
        if self.num_tokens > self.max_tokens:
            raise ValueError(f"N = {self.num_tokens} tokens, but the tables have max_tokens = {self.max_tokens} rows")
        if self.repa_layer is not None and self.repa_layer >= self.diffusion_layers:
            raise ValueError(f"repa_layer = {self.repa_layer} must be below diffusion_layers = {self.diffusion_layers}")
        check_group_rule(self.group_rule)

    @property
    def group_size(self) -> int:
        """Tokens in a group, N / K."""
        return self.num_tokens // self.num_groups


def _check_range(what: str, numbers: Tensor, count: int) -> None:
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 0)
    if low < 0 or high >= count:
        raise ValueError(f"{what} from {low} to {high}: expected 0 ... {count - 1}")


LITE = dict(encoder_width=512, decoder_width=512, diffusion_width=512, diffusion_layers=8, repa_layer=5)
TINY = dict(image_size=32, encoder_patch=4, diffusion_patch=4, num_tokens=64, codebook_size=1024, repa_layer=None)
TINY |= dict(encoder_width=128, decoder_width=128, diffusion_width=128, init_std=0.08)
TINY |= dict(encoder_layers=4, decoder_layers=4, diffusion_layers=6)
TOKENIZER_PRESETS = {
    "v1": TokenizerConfig(),  # 307M parameters; 1.52 rFID in Table 2
    "lite": TokenizerConfig(**LITE),  # 113M, of the ablations in appendix III
    "tiny": TokenizerConfig(**TINY),  # 32x32 pixels, 4M, trains on two CPU cores
    "cifar10": TokenizerConfig(**TINY, time_shift=4.0),  # of the shipped model
}


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def encoder_mask(num_patches: int, num_queries: int, device: torch.device) -> Tensor:
    """bool [P+N, P+N], true where row may attend to column: all to patches, queries also up to themselves."""
    mask = torch.ones(2 * [num_patches + num_queries], dtype=torch.bool, device=device).tril()
    mask[:, :num_patches] = True
    return mask


class SequentialDiffusionTokenizer(nn.Module):
    """Fig. 4: images to N codes in the order of diffusion time, and back. Called, it returns the training losses."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, self.recompute = config, False
        c = config
        self.patchify = nn.Conv2d(3, c.encoder_width, c.encoder_patch, stride=c.encoder_patch)
        self.query_embedding = nn.Embedding(c.max_tokens, c.code_dim)  # low rank: widened by query_linear
        self.query_linear = nn.Linear(c.code_dim, c.encoder_width)
        self.encoder_layers = nn.ModuleList(GatedBlock(c.encoder_width) for _ in range(c.encoder_layers))
        self.quant_in = nn.Linear(c.encoder_width, c.code_dim, bias=False)
        self.quantize = VectorQuantizer(c.codebook_size, c.code_dim)
        self.quant_out = nn.Linear(c.code_dim, c.decoder_width, bias=False)
        self.decoder_embedding = nn.Embedding(c.max_tokens, c.decoder_width)  # learned positions
        self.decoder_layers = nn.ModuleList(GatedBlock(c.decoder_width) for _ in range(c.decoder_layers))
        init_linears(self, c.init_std)
        # Unit vectors z enter the causal decoder at the scale of a LayerNorm's output, well above the positions: with
        # 0.02 here and N(0, 1) positions, z' would hardly depend on the codes for the first hundreds of steps.
        nn.init.normal_(self.quant_out.weight)
        nn.init.normal_(self.decoder_embedding.weight, std=0.02)
        sizes = c.diffusion_width, c.decoder_width, c.diffusion_layers, c.diffusion_patch
        self.diffusion = DiffusionDecoder(*sizes, c.repa_layer, c.init_std)

    # The parts, from left to right in Fig. 4

    def features(self, images: Tensor) -> Tensor:
        """Encoder, eq. 1 before quant(): float [B, 3, H, W] in [-1, 1] -> [B, N, D], which the quantizer normalises."""
        c = self.config
        self._check_size(images, "images", c.encoder_patch)
        patches = self.patchify(images.to(self.patchify.weight.dtype))  # [B, C, H/p, W/p]
        height, width = patches.shape[2:]
        patches = normalize(patches.flatten(2).transpose(1, 2))  # [B, P, C], row-major
        queries = self.query_linear(self.query_embedding.weight[: c.num_tokens]).to(patches.dtype)
        x = torch.cat((patches, queries.expand(len(images), -1, -1)), 1)  # [B, P+N, C]
        rope = rope_2d(height, width, c.num_tokens, x.device)
        mask = encoder_mask(height * width, c.num_tokens, x.device)
        x = run_blocks(self.encoder_layers, x, self.recompute, rope=rope, mask=mask)
        return self.quant_in(normalize(x[:, -c.num_tokens :]))

    def causal_decoder(self, z: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Code vectors z [B, n, D] -> z' [B, n, decoder_width]; with caches, z follows the tokens that they hold."""
        start = caches[0].filled if caches else 0
        position = self.decoder_embedding.weight[start : start + z.shape[1]]
        x = self.quant_out(z.to(self.quant_out.weight.dtype)) + position
        return normalize(run_blocks(self.decoder_layers, x, self.recompute, caches=caches, causal=True))

    def forward(self, images: Tensor, s=None, noise=None, code_noise=None) -> dict[str, Tensor]:
        """The training step of section 4: encode, quantize, draw a time, denoise with that time's group of z'.
        images: float [B, 3, H, W] in [-1, 1]. s: uniform times in [0, 1], [B], or [B, R]: R times for each image,
        which is encoded once; drawn if None. noise: x0, [B, 3, H, W] or [B, R, 3, H, W]; drawn if None.
        code_noise: [B, N, D], added to the normalised features in place of quantization (codebook warm-up).
        Returns the scalars "fm" (eq. 2, over data_scale²), "vq" and "commit" (appendix I, weighted) and "kept",
        the number of tokens these two are means over; "codes" [B, N]; "pred_image" (jump estimates [B·R, 3, H, W], not
        clamped, for LPIPS); and "repa" ([B·R, g·g, 768]) if there is a head. Summing them, eq. 7, is the script's."""
        c, batch = self.config, len(images)
        s = (torch.rand(batch, device=images.device) if s is None else s).view(batch, -1)  # [B, R]
        x1 = (c.data_scale * images.float()).repeat_interleave(s.shape[1], 0)  # [B·R, 3, H, W]
        x0 = torch.randn_like(x1) if noise is None else noise.view(x1.shape)
        group = condition_group(s, c.num_groups, c.group_rule)  # [B, R]

        # Tokens after the last group that is used cannot have mattered: the quantizer's losses leave them out.
        used = (group.amax(1, keepdim=True) + 1) * c.group_size
        keep = torch.arange(c.num_tokens, device=images.device) < used  # [B, N]
        f = self.features(images)
        z, codes, vq, commit = self.quantize(f, keep)
        if code_noise is not None:
            z = F.normalize(F.normalize(f.float(), dim=-1) + code_noise, dim=-1)
            vq, commit = 0 * vq, 0 * commit  # still in the graph: DDP wants a gradient for the codebook

        groups = self.causal_decoder(z).unflatten(1, (c.num_groups, c.group_size))  # [B, K, N/K, C]
        condition = groups[torch.arange(batch, device=s.device)[:, None], group].flatten(0, 1)  # [B·R, N/K, C]
        t = shift_time(s, c.time_shift).flatten()
        x_t = interpolate(x0, x1, t)
        velocity, features = self.diffusion(x_t, t, condition, repa=c.repa_layer is not None)
        out = {"fm": F.mse_loss(velocity, x1 - x0) / c.data_scale**2, "vq": vq, "commit": c.commit_weight * commit}
        out |= {"kept": keep.sum(), "codes": codes, "pred_image": jump_estimate(x_t, velocity, t) / c.data_scale}
        return out if features is None else out | {"repa": features}

    # What users call

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> codes, int64 [B, N]. Raises ValueError if patches do not divide H and W."""
        return self.quantize.nearest(self.features(images))

    def condition(self, codes: Tensor) -> Tensor:
        """The causal decoder in one pass: int64 [B, n], any n <= N -> z' [B, n, decoder_width]."""
        self._check_codes(codes)
        return self.causal_decoder(self.quantize.lookup(codes))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """D_FM(x_t, t | a group of z') of eq. 2, float32 [B, 3, H, W]."""
        return self.diffusion(x_t, t, condition)[0]

    @torch.no_grad()
    def denoise(self, code_groups: Iterable[Tensor], noise: Tensor, num_steps=None, solver: str = "ab2") -> Iterator:
        """The sampler behind decode, previews and stream: takes each denoising step as soon as its group is there.
        code_groups yields K (or fewer) groups of codes, int64 [B, N/K]; noise is x0 [B, 3, H, W]. After each group it
        yields (x_t, previews): where the flow then stands (in the end, the decoded image), and a list of the jump
        estimates of the steps taken with that group (one, if S = K); all over data_scale, float32 [B, 3, H, W]."""
        c, dtype = self.config, self.quant_out.weight.dtype
        self._check_size(noise, "noise", c.diffusion_patch)
        num_steps = (c.num_steps or c.num_groups) if num_steps is None else num_steps
        schedule = sampling_schedule(num_steps, c.num_groups, c.time_shift, c.group_rule)
        heads = c.decoder_width // HEAD_DIM
        caches = [KVCache(len(noise), heads, c.num_tokens, noise.device, dtype) for _ in self.decoder_layers]
        x, v_prev = noise.float(), None
        for k, codes in enumerate(code_groups):
            if len(codes) != len(noise):
                raise ValueError(f"noise for {len(noise)} pictures, codes for {len(codes)}")
            condition = self.causal_decoder(self.quantize.lookup(codes), caches)
            previews = []
            for t, t_next, group in schedule:
                if group == k:
                    v = self.velocity(x, x.new_full((1,), t), condition)
                    previews.append(jump_estimate(x, v, t) / c.data_scale)
                    x, v_prev = solver_step(x, v, v_prev, t_next - t, solver), v
            yield x / c.data_scale, previews

    @torch.no_grad()
    def decode(self, codes: Tensor, noise: Tensor | None = None, num_steps=None, solver: str = "ab2") -> Tensor:
        """Codes int64 [B, n] -> images, float32 [B, 3, H, W], about [-1, 1] and not clamped.
        noise is x0 [B, 3, H, W] and sets the size; drawn at config.image_size if None. num_steps S: config's if None.
        Fewer than N codes, whole groups, give the partial decoding of section 5.1: the last preview that they allow.
        (Table 5 was probably made with the authors' variant, whose last jump has ab2's weights; ours has Euler's.)
        Raises ValueError if n is no multiple of N/K or a code or size does not fit."""
        preview = None  # never stays None: step 0 uses group 0
        for x, previews in self._denoise_codes(codes, noise, num_steps, solver):  # noqa: B007
            preview = previews[-1] if previews else preview
        return x if codes.shape[1] == self.config.num_tokens else preview

    @torch.no_grad()
    def previews(self, codes: Tensor, noise: Tensor | None = None, num_steps=None, solver: str = "ab2") -> Tensor:
        """What decode() shows on its way (Fig. 5): a jump estimate for each step, in order, [steps, B, 3, H, W]."""
        rounds = self._denoise_codes(codes, noise, num_steps, solver)
        return torch.stack([preview for _, previews in rounds for preview in previews])

    def _denoise_codes(self, codes: Tensor, noise: Tensor | None, num_steps: int | None, solver: str) -> Iterator:
        c = self.config
        self._check_codes(codes)
        if codes.shape[1] == 0 or codes.shape[1] % c.group_size:
            raise ValueError(f"{codes.shape[1]} codes: decoding takes whole groups of {c.group_size}")
        if noise is None:
            noise = torch.randn(len(codes), 3, c.image_size, c.image_size, device=codes.device)
        return self.denoise(codes.split(c.group_size, 1), noise, num_steps, solver)

    def _check_size(self, images: Tensor, what: str, patch: int) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{what} of shape {list(images.shape)}: expected [B, 3, H, W]")
        height, width = images.shape[2:]
        if height % patch or width % patch or not height * width:
            raise ValueError(f"{what} of {width}x{height} pixels: expected multiples of the patch size {patch}")

    def _check_codes(self, codes: Tensor) -> None:
        c = self.config
        if codes.ndim != 2 or codes.shape[1] > c.num_tokens or codes.dtype != torch.int64:
            found = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"codes: {found}, expected torch.int64 [B, n] with n <= {c.num_tokens}")
        _check_range("codes", codes, c.codebook_size)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Llama
# An unmodified decoder-only transformer (section 3.2): RMSNorm, SwiGLU, 1D RoPE, the class as a prefix token. Nothing
# in it knows about images; that is the point of D-AR.


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """All that shapes a Llama; heads are 64 wide. Raises ValueError, naming the value, on what cannot be built."""

    width: int = 768
    layers: int = 12
    vocab_size: int = 16384  # the tokenizer's codebook_size
    num_classes: int = 1000  # class num_classes, one more row of the table, means unconditional
    num_tokens: int = 256  # N, how many tokens a picture has
    dropout: float = 0.1  # on embeddings, attention outputs and MLP outputs, when training

    def __post_init__(self):
        _check_fields(self, may_be_zero=("layers", "dropout"))


AR_PRESETS = {
    "B": ARConfig(768, 12),  # 111M
    "L": ARConfig(1024, 24),  # 343M, D-AR-L
    "XL": ARConfig(1280, 36),  # 775M, D-AR-XL: 2.09 FID in Table 3
    "tiny": ARConfig(192, 6, vocab_size=1024, num_classes=10, num_tokens=64),  # for the "tiny" tokenizer
    "cifar10": ARConfig(256, 5, vocab_size=1024, num_classes=10, num_tokens=64),  # of the shipped model
}


class RMSNorm(nn.Module):
    """x / rms(x) · weight, eps 1e-5, the quotient in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class LlamaAttention(nn.Module):
    """Causal multi-head attention with one fused projection (rows: queries, keys, values) and RoPE. A cache is extended
    by x or, given a place and a mask as wide as what is read of it, takes the one token of x there (NextToken)."""

    def __init__(self, width: int):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None = None, place=None, mask=None) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)  # [3, B, heads, n, 64]
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if cache is not None:
            k, v = cache.extend(k, v) if place is None else cache.put(k, v, place, mask.shape[-1])
        return self.wo(attend(q, k, v, mask, causal=mask is None).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x); hidden width 8/3 C, rounded down and then up to a multiple of 256."""

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
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

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None = None, place=None, mask=None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, cache, place, mask))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class ARTransformer(nn.Module):
    """p(z_i | class, z_1 ... z_{i-1}), eq. 6. `tokenizer` is set when the model was loaded with one."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config, self.recompute = config, False
        self.compiled, self.replays, self.recorded = False, False, {}  # compile_for_sampling; a NextToken for reuse
        self.attach_tokenizer(None)
        self.class_names: list[str] | None = None
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.width)  # the last row: unconditional
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaBlock(config.width, config.dropout) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # zero-initialised: the first loss is log V

    def check_tokenizer(self, tokenizer: SequentialDiffusionTokenizer) -> None:
        """Raises ValueError, naming both values, if a tokenizer's codes are not those that this model writes."""
        mine, its = self.config, tokenizer.config
        for what, a, b in (("codes", mine.vocab_size, its.codebook_size), ("tokens", mine.num_tokens, its.num_tokens)):
            if a != b:
                raise ValueError(f"the model has {a} {what}, the tokenizer {b}: they do not belong together")

    def attach_tokenizer(self, tokenizer: SequentialDiffusionTokenizer | None) -> None:
        """Sets `tokenizer`, which turns this model's codes into pictures. Raises ValueError if the two do not fit."""
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        object.__setattr__(self, "tokenizer", tokenizer)  # a companion, not a part: its weights are not this module's

    def embed(self, labels: Tensor | None, codes: Tensor) -> Tensor:
        """Class embedding [B, 1, C] of int64 labels [B], if any; then token embeddings [B, n, C] of codes [B, n]."""
        tokens = self.tok_embeddings(codes)
        return tokens if labels is None else torch.cat((self.cls_embedding(labels)[:, None], tokens), 1)

    def run(self, x: Tensor, caches: list[KVCache] | None = None, place=None, mask=None) -> Tensor:
        """Embeddings [B, n, C] -> hidden states [B, n, C]; with caches, they follow the positions that these hold, or,
        with place (int64 [1]) and mask (bool [1, m], true up to it), the one embedding's keys and values go there."""
        start = caches[0].filled if caches else 0
        rope = rope_1d(self.config.num_tokens + 1, x.device)
        rope = rope[start : start + x.shape[1]] if place is None else rope[place]
        cached = dict(caches=caches, place=place, mask=mask)
        return self.norm(run_blocks(self.layers, self.dropout(x), self.recompute, rope, **cached))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """codes int64 [B, n], n <= N, labels int64 [B] -> logits, float32 [B, n+1, V]; those at i predict token i."""
        return self.output(self.run(self.embed(labels, codes))).float()

    def generate(
        self, labels: Tensor, num_tokens=None, cfg=(1.1, 8.0), seeds=None, greedy=False, prefix=None, **filters
    ) -> Tensor:
        """Draws pictures' codes, int64 [B, N], for labels int64 [B] (num_classes = unconditional); call eval() first.
        cfg: guidance, a number, a (start, end) pair that it runs between, or None for none (guidance_schedule). seeds:
        one for each picture, or an int s that means s, s+1, ...; None draws fresh ones. greedy takes the most likely
        token instead. temperature, top_k (0: off) and top_p (1: off) act on the guided logits in this order. prefix:
        tokens int64 [n] or [B, n] kept as given (section 5.1, zero-shot control). num_tokens: config's N if None.
        Raises ValueError for a value out of range."""
        return torch.cat([*generate_groups(self, labels, num_tokens, None, cfg, seeds, greedy, prefix, **filters)], 1)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Generation
# Tokens are drawn left to right with a KV cache. All randomness of a picture comes from its own seed, so a picture does
# not depend on the batch it was drawn in, or on how many processes shared the work.

NOISE_BLOCK = 32  # tokens whose random numbers are drawn at once


def guidance_schedule(cfg: float | tuple[float, float] | None, num_tokens: int) -> list[float] | None:
    """Guidance of each token (Table 4): constant, or linear from start at the first to end at the last token. None
    where there is nothing to guide: cfg None, or 1 throughout. Raises ValueError if cfg is neither form."""
    start, end = cfg if isinstance(cfg, tuple | list) and len(cfg) == 2 else (1.0 if cfg is None else cfg,) * 2
    for value in (start, end):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"guidance {cfg!r}: expected a number, a pair of numbers, or None")
    if start == end == 1:
        return None
    return [start + (end - start) * i / max(num_tokens - 1, 1) for i in range(num_tokens)]


def resolve_seeds(seeds: int | list[int] | None, count: int) -> list[int]:
    """One seed each: an int s means s, s+1, ...; None draws fresh ones. Raises ValueError outside 0 ... 2**31 - 1."""
    if seeds is None:
        return torch.randint(2**31, (count,)).tolist()
    seeds = list(range(seeds, seeds + count)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures: expected one each")
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed {seed}: expected 0 ... {2**31 - 1}")
    return seeds


def picture_generators(seeds: list[int], purpose: int, device: torch.device) -> list[torch.Generator]:
    """Each picture's generators: purpose 0 for its noise x0, 1 for its tokens, so that neither shifts the other."""
    return [torch.Generator(device).manual_seed(2 * seed + purpose) for seed in seeds]


def initial_noise(seeds: list[int], size: int, device: torch.device) -> Tensor:
    """x0 of eq. 4, each picture's from its own seed: float32 [B, 3, size, size]."""
    generators = picture_generators(seeds, 0, device)
    return torch.stack([torch.randn(3, size, size, device=device, generator=g) for g in generators])


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits [B, V] / temperature, then -inf outside the top_k largest, then outside the smallest set of mass top_p."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered = logits.sort(descending=True).values
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # mass of the likelier ones: 0 for the first, which always stays
        smallest = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


class NextToken:
    """The network's part of generation: `first` reads class and prefix at once, `after` one token. There, place and
    mask are tensors, not Python's numbers, and shapes stay the same for 32 tokens, so that a GPU can replay one
    recording for all of them (Replayed, chapter 10)."""

    def __init__(self, ar, batch: int, guided: bool, count: int, filters: dict):
        c, weight = ar.config, ar.output.weight
        self.ar, self.guided, self.filters = ar, guided, filters
        # Both halves of guidance run in one batch: the pictures with their class, and once more without.
        self.halves = 2 if guided else 1
        sizes = self.halves * batch, c.width // HEAD_DIM, count, weight.device, weight.dtype
        self.caches = [KVCache(*sizes) for _ in range(c.layers)]

    @torch.compiler.set_stance("force_eager")  # once a picture, and each length of prefix would be compiled anew
    def first(self, labels: Tensor, prefix: Tensor, scale: Tensor, gumbel: Tensor) -> Tensor:
        """The tokens [B, 1] after the class labels [B] and a prefix [B, n], which fill the caches."""
        for cache in self.caches:
            cache.clear()
        if self.guided:
            labels = torch.cat((labels, torch.full_like(labels, self.ar.config.num_classes)))
        x = self.ar.embed(labels, prefix.repeat(self.halves, 1))
        return self.choose(self.ar.run(x, self.caches), scale, gumbel)

    def after(self, codes: Tensor, place: Tensor, mask: Tensor, scale: Tensor, gumbel: Tensor) -> Tensor:
        """The tokens [B, 1] after codes [B, 1], which stand at `place` of the caches; the mask is true up to there."""
        x = self.ar.embed(None, codes.repeat(self.halves, 1))
        fixed = (place, mask) if self.ar.compiled else ()  # else the caches themselves know, and read no further
        return self.choose(self.ar.run(x, self.caches, *fixed), scale, gumbel)

    def choose(self, hidden: Tensor, scale: Tensor, gumbel: Tensor) -> Tensor:
        """Hidden states [halves · B, n, C] -> argmax of guided (scale [1]) and filtered logits + gumbel [B, V]."""
        logits = self.ar.output(hidden[:, -1]).float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
        return (filter_logits(logits, **self.filters) + gumbel).argmax(-1, keepdim=True)


@torch.no_grad()
def generate_groups(
    ar, labels, num_tokens=None, group_size=None, cfg=(1.1, 8.0), seeds=None, greedy=False, prefix=None, **filters
) -> Iterator[Tensor]:
    """ARTransformer.generate, yielding each group_size tokens, int64 [B, group_size], as soon as they are drawn.
    A token is argmax(logits + Gumbel noise), which draws from softmax(logits). filters: temperature, top_k, top_p."""
    c, device, batch = ar.config, labels.device, len(labels)
    count = c.num_tokens if num_tokens is None else num_tokens
    prefix = _check_generation(ar, labels, count, prefix, **filters)
    scale = guidance_schedule(cfg, count)
    given = prefix.shape[1]
    generators = [] if greedy else picture_generators(resolve_seeds(seeds, batch), 1, device)
    codes = torch.empty(batch, count, dtype=torch.int64, device=device)
    codes[:, :given] = prefix
    places, scales = torch.arange(count, device=device), torch.tensor(scale or [1.0], device=device).expand(count)

    settings = batch, scale is not None, count, {} if greedy else filters
    made = ar.recorded.pop(str(settings), None)  # taken out, so that a generator that runs meanwhile makes its own
    if made is None:
        ar.recorded.clear()  # memory for one is enough
        step = NextToken(ar, *settings)
        made = step, Replayed(step.after) if ar.replays else step.after
    step, after = made
    try:
        for i in range(count):
            if i % NOISE_BLOCK == 0:  # drawn under a prefix too: the noise of token i is always the same
                noise = torch.ones(batch, NOISE_BLOCK, c.vocab_size, device=device)
                for mine, generator in zip(noise, generators):
                    mine.exponential_(generator=generator)
                gumbel = -noise.log().transpose(0, 1)  # [32, B, V]; 0 if greedy
                end = min(i + NOISE_BLOCK, count)  # how far the caches are read: one shape, and one recording, a block
            if i == given:
                codes[:, i : i + 1] = step.first(labels, prefix, scales[i : i + 1], gumbel[i % NOISE_BLOCK])
            elif i > given:
                at = places[i : i + 1], places[None, :end] <= i
                codes[:, i : i + 1] = after(codes[:, i - 1 : i], *at, scales[i : i + 1], gumbel[i % NOISE_BLOCK])
            if (i + 1) % (group_size or count) == 0 or i + 1 == count:
                yield codes[:, i - i % (group_size or count) : i + 1]
    finally:
        if ar.replays:
            ar.recorded[str(settings)] = made


def _check_generation(ar, labels, count, prefix, temperature=1.0, top_k=0, top_p=1.0) -> Tensor:
    """Raises ValueError for a setting out of range; returns the prefix as int64 [B, n], n = 0 without one."""
    c = ar.config
    if not 1 <= count <= c.num_tokens:
        raise ValueError(f"num_tokens = {count}: the model draws 1 ... {c.num_tokens}")
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: {labels.dtype} {list(labels.shape)}, expected torch.int64 [B]")
    _check_range("class labels", labels, c.num_classes + 1)
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected > 0, >= 0, and in (0, 1]")
    if prefix is None:
        return labels.new_empty(len(labels), 0)
    fits = prefix.ndim == 1 or prefix.ndim == 2 and len(prefix) in (1, len(labels))
    if not fits or prefix.dtype != torch.int64 or prefix.shape[-1] > count:
        wanted = f"torch.int64 [n] or [B, n] with B = {len(labels)}, n <= {count}"
        raise ValueError(f"prefix: {prefix.dtype} {list(prefix.shape)}, expected {wanted}")
    _check_range("prefix tokens", prefix, c.vocab_size)
    return prefix.to(labels.device).expand(len(labels), -1)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Streaming
# Fig. 1 in one function: while the Llama writes, each finished group of tokens takes the picture one denoising step on,
# and the velocity of that step gives a preview for nothing.


class StreamStep(typing.NamedTuple):
    """What stream() yields after each group."""

    codes: Tensor  # int64 [B, n], the tokens so far
    x: Tensor  # x_t / data_scale, float32 [B, 3, H, W]; after the last group the picture, not clamped
    preview: Tensor  # the newest jump estimate, float32 [B, 3, H, W]


def stream(
    ar, tokenizer, labels: Tensor, cfg=(1.1, 8.0), seeds=None, noise=None, num_steps=None, solver="ab2", **sampling
) -> Iterator[StreamStep]:
    """Section 3.3: yields a StreamStep after each group of N/K tokens; the last one's x is the finished picture.
    labels, cfg, seeds and sampling (greedy, temperature, top_k, top_p, prefix) are those of ARTransformer.generate,
    num_steps and solver those of the tokenizer's decode. noise: x0, each picture's own if None.
    The same codes and noise given to decode() end in the same picture: both are tokenizer.denoise."""
    ar.check_tokenizer(tokenizer)
    seeds = resolve_seeds(seeds, len(labels))
    if noise is None:
        noise = initial_noise(seeds, tokenizer.config.image_size, labels.device)
    groups = generate_groups(ar, labels, None, tokenizer.config.group_size, cfg, seeds, **sampling)
    groups, drawn = itertools.tee(groups)
    codes, preview = labels.new_empty(len(labels), 0), None
    for (x, previews), group in zip(tokenizer.denoise(groups, noise, num_steps, solver), drawn):
        codes = torch.cat((codes, group), 1)
        preview = previews[-1] if previews else preview  # the first round brings one: step 0 uses group 0
        yield StreamStep(codes, x, preview)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Checkpoints
# Ours are one file of plain dicts and tensors: {"format", "kind", "config", "model", perhaps "ema", "class_names",
# "tokenizer" (a whole tokenizer checkpoint inside a Llama's), "training" (what resuming needs)}. The authors' files are
# recognised by what is in them and renamed key by key. Either way a file is data: nothing in it can run.

FORMAT = "dar-1"


@contextlib.contextmanager
def _about(path: str | Path) -> Iterator[None]:
    """Puts the file's name before a ValueError's message, in one line whatever a damaged file brought into it."""
    try:
        yield
    except ValueError as error:
        message = "".join(c if c.isprintable() else "?" for c in str(error))
        raise ValueError(f"{path}: {message}") from None


def _check_zip(path: Path) -> None:
    """Checks what torch.load takes on trust: that the directory points to the right entries, that they are stored as
    they are (a mapped tensor is read where it lies, compressed or not), that the pickle is the one that was written."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
            with file.open(entry) as data:  # compares the name that stands there
                if entry.filename.endswith("data.pkl"):
                    data.read()  # compares its checksum


def read_checkpoint(path: str | Path) -> dict:
    """A .pt file as a dict whose tensors are mapped, not read: what is never touched costs neither time nor memory.
    Raises FileNotFoundError, or ValueError in one line: no torch zip file, damaged, or asking to run code."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with _about(path):
        is_zip = False
        with contextlib.suppress(zipfile.BadZipFile):  # so damaged that even the question fails
            is_zip = path.is_file() and zipfile.is_zipfile(path)
        if not is_zip:
            hint = "an old one: load it with the torch that wrote it and torch.save it again; a download: repeat it"
            raise ValueError(f"not a checkpoint in torch's zip format ({hint})")
        inert = types.SimpleNamespace  # holds attributes and does nothing, in place of what released files mention
        stand_ins = [(inert, "argparse.Namespace"), (inert, "config_util.Config")]
        try:
            _check_zip(path)
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on odd pickles: the error says what matters
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle can fail in any way there is
            found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
            if found and "weights_only" in str(error):
                raise ValueError(f"refused: it holds {found[1]}, which could run code; only plain data loads") from None
            reason = f"{type(error).__name__}: {error}"
            inner = re.search(r"WeightsUnpickler error:\s*(.+)", reason)  # before it, torch advises weights_only=False
            reason = (inner.group(1) if inner else reason.splitlines()[0])[:160]
            raise ValueError(f"damaged or incomplete checkpoint ({reason}); copy or download it again") from None
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__}, expected a checkpoint's dict")
    return data


def save_checkpoint(path: str | Path, model: nn.Module, ema=None, training: dict | None = None, dtype=None) -> None:
    """Writes a tokenizer or a Llama, with its tokenizer and class names if it has them, in the project's format.
    ema: the averaged weights, which loading prefers. training: plain data for resuming. dtype: of weights, else kept.
    The file appears whole or not at all, whatever happens meanwhile. Raises OSError if it cannot be written."""
    data = _bundle(model, dtype)
    if ema is not None:
        data["ema"] = _weights(ema, dtype)
    if training is not None:
        data["training"] = training
    write_atomically(path, lambda file: torch.save(data, file))


def _weights(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}


def _bundle(model: nn.Module, dtype: torch.dtype | None) -> dict:
    kind = "tokenizer" if isinstance(model, SequentialDiffusionTokenizer) else "ar"
    data = {"format": FORMAT, "kind": kind, "config": dataclasses.asdict(model.config)}
    data["model"] = _weights(model, dtype)
    if kind == "ar" and model.tokenizer is not None:
        data["tokenizer"] = _bundle(model.tokenizer, dtype)
    if kind == "ar" and model.class_names is not None:
        data["class_names"] = list(model.class_names)
    return data


def write_atomically(path: str | Path, write) -> None:
    """Calls write(file) on a temporary neighbour, flushes it to the disk and renames it to path. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}); nothing was replaced") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_tokenizer(path: str | Path, device="cpu", dtype=None, weights: str = "ema") -> SequentialDiffusionTokenizer:
    """A tokenizer from our format or the authors' released layout, told apart by content; in eval mode.
    dtype: of the weights, else the file's. weights: "ema" (the plain ones where a file has no others) or "model".
    Released files bring the group rule "nearest" and their own data scale; a bare state dict has v1's. Raises
    FileNotFoundError, or ValueError naming the file and every key that is missing, unexpected or of a wrong shape."""
    data = read_checkpoint(path)
    with _about(path):
        return _build_tokenizer(data, device, dtype, weights)


def load_ar(path, device="cpu", dtype=None, weights="ema", tokenizer=None, num_tokens=None) -> ARTransformer:
    """A Llama from our format or the released layout, in eval mode; `tokenizer` is the one given, else the file's, else
    None. Released files do not say N: it is the tokenizer's, else num_tokens, else 256. Otherwise as load_tokenizer."""
    data = read_checkpoint(path)
    with _about(path):
        config, state = _recognise(data, weights, ARConfig)
        if tokenizer is None and config is not None and "tokenizer" in data:
            if not isinstance(data["tokenizer"], dict):
                raise ValueError(f"its tokenizer is a {type(data['tokenizer']).__name__}, expected a checkpoint's dict")
            tokenizer = _build_tokenizer(data["tokenizer"], device, dtype, weights)
        if config is None:  # a released file
            codes, width = _shape(state, "tok_embeddings.weight", 2)
            classes = _shape(state, "cls_embedding.weight", 2)[0] - 1
            n = tokenizer.config.num_tokens if tokenizer else num_tokens or 256
            config = ARConfig(width, _depth(state, "layers."), codes, classes, n)
        ar = _assign(ARTransformer, config, state, device, dtype)
        names = data.get("class_names")
        if names is not None:
            if not isinstance(names, list) or {type(n) for n in names} != {str} or len(names) != config.num_classes:
                raise ValueError(f"class_names is no list of {config.num_classes} names")
            ar.class_names = names
        ar.attach_tokenizer(tokenizer)
    return ar


def _build_tokenizer(data: dict, device, dtype, weights: str) -> SequentialDiffusionTokenizer:
    config, state = _recognise(data, weights, TokenizerConfig)
    config = config or _released_tokenizer_config(data.get("config"), state)
    return _assign(SequentialDiffusionTokenizer, config, state, device, dtype)


RELEASED_NAMES = {  # prefix in the authors' files -> ours; the first that fits counts
    "quant_in_conv.": "quant_in.",
    "quant_out_conv.": "quant_out.",
    "diff_decoder.net.conv_in.": "diffusion.patch_in.",
    "diff_decoder.net.conv_out.": "diffusion.patch_out.",
    "diff_decoder.net.repa_out.": "diffusion.repa_head.",
    "diff_decoder.net.": "diffusion.",
    "cls_embedding.embedding_table.": "cls_embedding.",
}
LAYERS = {name: f"{name}." for name in ("layers", "encoder_layers", "decoder_layers")}  # field -> prefix of its blocks
LAYERS["diffusion_layers"] = "diffusion.blocks."


def _recognise(data: dict, weights: str, config_class) -> tuple[TokenizerConfig | ARConfig | None, dict]:
    """(config, or None where a released file leaves it to the shapes; state dict under our names)."""
    if weights not in ("ema", "model"):
        raise ValueError(f"weights {weights!r}: expected 'ema' or 'model'")
    places = (data.get("ema") if weights == "ema" else None), data.get("model"), data
    found = next(place for place in places if isinstance(place, dict))
    state = {}
    for name, value in found.items():  # DistributedDataParallel and torch.compile leave prefixes
        name = re.sub(r"^((module|_orig_mod)\.)+", "", name if isinstance(name, str) else repr(name))
        prefix = next((released for released in RELEASED_NAMES if name.startswith(released)), "")
        name = RELEASED_NAMES.get(prefix, "") + name.removeprefix(prefix)
        if name in state:
            raise ValueError(f"{name} stands in it twice, with and without a prefix")
        if name.startswith(("quant_", "diffusion.patch_")) and isinstance(value, Tensor) and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # released 1x1 convolutions are our Linears
        state[name] = value
    state.pop("quantize.codebook_used", None)  # the authors' usage counter, no weight
    kinds = {TokenizerConfig: ("a tokenizer", "patchify.weight"), ARConfig: ("a Llama", "tok_embeddings.weight")}
    holds = [kind for kind, key in kinds.values() if key in state] or ["neither tokenizer nor Llama"]
    wanted, key = kinds[config_class]
    if holds[0] != wanted:
        raise ValueError(f"holds {holds[0]}, expected {wanted} (with {key})")
    if "format" not in data:
        return None, state
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r:.40}, expected {FORMAT!r}; a newer dar.py wrote it")
    try:
        return config_class(**data["config"]), state
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"unusable config ({error})") from None


def _shape(state: dict, name: str, dims: int) -> tuple[int, ...]:
    value = state.get(name)
    if not isinstance(value, Tensor) or value.ndim != dims:
        raise ValueError(f"{name} is missing or no tensor of {dims} dimensions, so the model's size is unknown")
    return tuple(value.shape)


def _depth(state: dict, prefix: str) -> int:
    numbers = (re.match(re.escape(prefix) + r"(\d{1,4})\.", name) for name in state)
    return len({number.group(1) for number in numbers if number})  # a gap shows as keys missing and unexpected


def _released_tokenizer_config(config, state: dict) -> TokenizerConfig:
    """Widths and depths from the shapes; N, K, S, data scale and beta from the config in the file, else v1's."""
    if isinstance(config, types.SimpleNamespace):
        config = config.__dict__.get("_data")
    config = {} if config is None else config.get("model", config) if isinstance(config, dict) else config
    diffusion = config.get("diff_decoder", {}) if isinstance(config, dict) else None
    if not isinstance(diffusion, dict):
        raise ValueError("its config is no dict of settings")
    says = diffusion | config
    for name, wanted in {"vq_enable": True, "mlp_head": False, "share_time_encoding": False}.items():
        if says.get(name, wanted) is not wanted:
            raise ValueError(f"its config says {name} = {says[name]!r}; only {wanted} is supported")
    fields = {name: _depth(state, prefix) for name, prefix in LAYERS.items() if name != "layers"}
    fields["encoder_width"], _, fields["encoder_patch"], _ = _shape(state, "patchify.weight", 4)
    fields["codebook_size"], fields["code_dim"] = _shape(state, "quantize.embedding.weight", 2)
    fields["max_tokens"], fields["decoder_width"] = _shape(state, "decoder_embedding.weight", 2)
    fields["diffusion_width"], pixels = _shape(state, "diffusion.patch_in.weight", 2)
    fields["diffusion_patch"] = math.isqrt(pixels // 3)
    fields["num_tokens"], fields["num_groups"] = says.get("num_all_queries", 256), says.get("num_query_groups", 8)
    fields["num_steps"], fields["time_shift"] = says.get("num_denoising_steps", 0), says.get("time_shift", 2.0)
    has_head, deepest = "diffusion.repa_head.0.weight" in state, fields["diffusion_layers"] - 1
    fields["repa_layer"] = says.get("repa_layer", min(8, deepest)) if has_head else None
    return TokenizerConfig(data_scale=says.get("data_std", 0.6), group_rule="nearest", **fields)


def _assign(model_class, config, state: dict, device, dtype) -> nn.Module:
    """Builds the model without memory, accounts for every key of the state dict, and gives it copies of the tensors."""
    for field, prefix in LAYERS.items():  # before a wrong number makes us build a thousand layers
        depth = _depth(state, prefix)
        if getattr(config, field, depth) != depth:
            raise ValueError(f"its config says {field} = {getattr(config, field)}, its weights have {depth}")
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            wrong.append(f"{name} is no dense tensor of floats")
        elif value.is_meta or value.untyped_storage().nbytes() < value.nbytes:  # more memory than the file has
            wrong.append(f"{name} claims {value.numel()} numbers that are not in the file")
        elif value.shape != expected[name].shape:
            wrong.append(f"{name} has shape {list(value.shape)}, expected {list(expected[name].shape)}")
    if wrong:
        more = f"; and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise ValueError(f"weights do not fit the model: {'; '.join(sorted(wrong)[:12])}{more}")
    weights = {name: state[name].to(device, dtype, copy=True) for name in expected}  # copies: the file may be replaced
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# 10. Plumbing
# What both trainings and the other scripts share: pictures, data, randomness that belongs to the sample, averaged
# weights, processes, faster sampling, and runs that survive being killed. Little here is particular to D-AR.


def command_line(main) -> None:
    """Runs main() for its exit code; instead of a traceback: one line and 2 (mistake), 3 (not finite), 130 (Ctrl-C)."""
    try:
        sys.exit(main())
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        print(f"error: torch.compile: {str(error).splitlines()[0]}; mend that or leave out --compile", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print("stopped" if stopped else f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(130 if stopped else 3 if isinstance(error, FloatingPointError) else 2)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def keep_freed_memory() -> None:
    """Linux's malloc gives large blocks that are freed back to the system, which hands them out anew page by page,
    cleared. Keeping them takes a tenth to a fifth off a training step on a CPU, and two fifths off encoding many
    images. Best called when the weights are loaded: what loading frees is better given back."""
    malloc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(malloc, "mallopt"):  # glibc
        malloc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        malloc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks when 2 GB lie free at its end


def pick_device(name: str) -> torch.device:
    """--device auto|cpu|cuda|mps -> the device; auto takes the fastest. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there.get(name, False):
        raise ValueError(f"--device {name}: not available here; there is {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and so about twice to four times faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Processes(typing.NamedTuple):
    """The processes that work together, each with its device: those of torchrun, or this one alone."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: torch.device) -> "Processes":
        """Joins the others if torchrun's environment says that there are any; each then has a GPU of its own."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
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

    def first_alone(self, action):
        """action(), by the first process before the others: what it downloads or lists, they find."""
        result = action() if self.rank == 0 else None
        self.barrier()
        return result if self.rank == 0 else action()


# Faster sampling


class PackedLinear(nn.Module):
    """A Linear for sampling on a CPU, its weight in the order in which oneDNN reads it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)  # no Parameter any more
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> nn.Module:
    """Packs the Linears of a model on a CPU, in place, and returns it; packed, they are neither trained nor saved.
    Products of a few rows, as in generation, take a half to a tenth of the time, float32 ones of many under half."""
    for name, child in model.named_children():
        if type(child) is not nn.Linear:
            pack_linears(child)
        elif child.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            setattr(model, name, PackedLinear(child))  # one by one, so that no second copy of all weights is needed
    return model


class Replayed:
    """A function of tensors whose work on a GPU is recorded as a CUDA graph, once for each shape of its inputs, and
    then replayed: one launch instead of hundreds, each of which takes longer than the little work it starts. What the
    function reads or writes besides must stay where it is in memory."""

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.function(*inputs)
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recorded:
            with torch.inference_mode(False):
                graph, buffers = torch.cuda.CUDAGraph(), [torch.empty_like(value).copy_(value) for value in inputs]
            self.function(*buffers)  # what happens only at a first call, such as compiling, must not be recorded
            before = next(iter(self.recorded.values()), None)
            with torch.cuda.graph(graph, pool=before and before[0].pool()):  # all work in the same memory, in turn
                output = self.function(*buffers)
            self.recorded[shapes] = graph, buffers, output
        graph, buffers, output = self.recorded[shapes]
        torch._foreach_copy_(buffers, inputs)
        graph.replay()
        return output.clone()  # the next replay overwrites it


def compile_for_sampling(model: nn.Module) -> nn.Module:
    """For many pictures on the current GPU, in place, returns the model: torch.compile fuses the small operations of
    the blocks that sampling runs through again and again, CUDA graphs replay their launches. On a CPU it only compiles.
    A Llama and its tokenizer need a call each. Afterwards weights may change in place only, and a Llama keeps the
    caches of the last batch until its `recorded` is cleared."""
    torch._dynamo.config.recompile_limit = 64  # one for each 32 tokens of cache that are read, at each size of batch
    for part in model.modules():
        if isinstance(part, LlamaBlock | DiffusionBlock):
            part.compile(dynamic=False)  # equal blocks share one compilation
    on_gpu = next(model.parameters()).device.type == "cuda"
    if isinstance(model, ARTransformer):
        model.compiled, model.replays = True, on_gpu
    elif on_gpu and not isinstance(model.velocity, Replayed):
        model.velocity = Replayed(model.velocity)
    return model


# Pictures


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
    """Float images [n, 3, H, W] in [-1, 1] -> one white-gapped picture, row by row."""
    images = F.pad(images, (gap, 0, gap, 0, 0, 0, 0, -len(images) % columns), value=1.0)  # [rows · columns, 3, H, W]
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [3, rows · H, ...]
    pixels = to_uint8(F.pad(rows, (0, gap, 0, gap), value=1.0))
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def load_rgb(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, whatever it was; alpha goes onto white. ValueError naming an unreadable file."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 bits: Pillow's convert would clip, not scale
                values = np.asarray(image, np.float64) / (257 if image.mode.startswith("I") else 1)
                return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def shrink(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize of the short side to size: halve with BOX while it is at least 2 size, then BICUBIC."""
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


# Data

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
# Polygons: how many corners, and the radius of every second one.
SHAPES = {"circle": (48, 1.0), "triangle": (3, 1.0), "square": (4, 1.0), "star": (10, 0.45), "gear": (24, 0.75)}


def draw_shape(index: int, size: int) -> Image.Image:
    """The index-th picture of the procedural dataset: a coloured shape on a coloured ground, classes in turn."""
    rng, scale = np.random.default_rng(index), 4 * size  # drawn large and averaged down: smooth edges
    ground, colour = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(2))
    radius, turn = scale * rng.uniform(0.2, 0.4), rng.uniform(0, 2 * math.pi)
    x, y = rng.uniform(radius, scale - radius, 2)
    corners, inner = list(SHAPES.values())[index % len(SHAPES)]
    outline = []
    for i in range(corners):
        angle, r = turn + 2 * math.pi * i / corners, radius * (inner if i % 2 else 1)
        outline.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    image = Image.new("RGB", (scale, scale), ground)
    ImageDraw.Draw(image).polygon(outline, fill=colour)
    return image.resize((size, size), Image.BOX)


def list_images(folder: str | Path) -> list[str]:
    """The image files below a folder, sorted, relative to it; FileNotFoundError or ValueError if there are none."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    start, found = len(os.path.join(folder, "")), []
    for root, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(root, name)[start:] for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


class ImageData:
    """Labelled images: a folder with one sub-folder a class, or the word "shapes", drawn by Pillow from the index.
    listing: a file that keeps the list of (a million) images from one start of a training to the next. Raises
    FileNotFoundError or ValueError, naming the folder, if there is nothing to train on."""

    def __init__(self, source: str, size: int, held_out: bool = False, listing: Path | None = None):
        self.source, self.size, self.held_out, self.kept = source, size, held_out, {}
        if source == "shapes":
            self.digest, self.names, self.class_names = source, None, list(SHAPES)
            self.labels = np.arange(1000 if held_out else 10000) % len(SHAPES)
        else:
            if listing is not None and listing.exists():
                names = listing.read_bytes().split(b"\0")
            else:
                names = [os.fsencode(name) for name in list_images(source)]
                if listing is not None:
                    listing.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(listing, lambda file: file.write(b"\0".join(names)))
            for name in names:
                if b"/" not in name:
                    raise ValueError(f"{source}/{os.fsdecode(name)}: expected a sub-folder for each class in {source}")
            classes = [os.fsdecode(name.split(b"/")[0]) for name in names]
            self.class_names, self.labels = np.unique(classes, return_inverse=True)
            self.class_names = self.class_names.tolist()
            self.digest = hashlib.sha256(b"\0".join(names)).hexdigest()[:16]
            self.names = np.array(names)  # one array, which worker processes share, instead of a million objects
        self.unreadable = torch.zeros(len(self.labels), dtype=torch.uint8)  # 1 where a file turned out to be corrupt

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Small ones stay in memory once decoded (CIFAR-10: 150 MB). ValueError if corrupt."""
        if self.names is None:
            return draw_shape(index + 10**6 * self.held_out, self.size)
        if index in self.kept:
            return self.kept[index]
        image = load_rgb(os.path.join(self.source, os.fsdecode(self.names[index])))
        if max(image.size) <= 64:
            self.kept[index] = image
        return image

    def next_readable(self, index: int) -> tuple[Image.Image, int]:
        """The first image from `index` on that can be read, and its index; files that are skipped are warned about."""
        for i in range(len(self)):
            try:
                found = (index + i) % len(self)
                return self.image(found), found
            except ValueError as error:
                print(f"warning: {error}; the next image takes its place", file=sys.stderr)
        raise ValueError(f"{self.source}: not one of its {len(self)} images can be read")

    def refuse_if_corrupt(self) -> None:
        """Raises ValueError if more than 1% of the files turned out to be unreadable: that is no accident any more."""
        bad = self.unreadable.nonzero().flatten().tolist()
        if len(bad) > 0.01 * len(self):
            found = f"{len(bad)} of {len(self)} images are unreadable, over 1% (as {os.fsdecode(self.names[bad[0]])})"
            raise ValueError(f"{self.source}: {found}")


# Randomness that belongs to the sample: position p counts the samples of a whole training, p = step · batch + place in
# the batch. What sample p is, how it is cropped and which noise it gets depend on (seed, p) alone, so a run resumes, or
# goes on with another number of processes, as if nothing had happened.
@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def data_index(position: int, count: int, seed: int) -> int:
    """Which of count images sample `position` is: every epoch runs through all of them in its own random order."""
    epoch, place = divmod(position, count)
    return int(_epoch_order(count, seed, epoch)[place])


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The small random choices of one sample's picture: crop, flip."""
    return np.random.default_rng([seed, 1, position])


class Samples(torch.utils.data.Dataset):
    """Sample position -> (uint8 image [3, H, W], label, position, files skipped before it because they are corrupt).
    transform(PIL image, numpy generator) crops and flips; its generator is the sample's own."""

    def __init__(self, data: ImageData, transform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, int, int]:
        index = data_index(position, len(self.data), self.seed)
        image, found = self.data.next_readable(index)
        pixels = torch.from_numpy(np.array(self.transform(image, sample_rng(self.seed, position)))).permute(2, 0, 1)
        return pixels, self.data.labels[found], position, (found - index) % len(self.data)


def leave_signals_to_the_parent(worker: int) -> None:
    """For the worker processes of a data loader: a Ctrl-C is the training's to answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# Training


class EMA:
    """Exponential moving average of a model's parameters, kept as a second model in eval mode (float32).
    Decay min(0.999, (1 + i) / (10 + i)) after i updates: the first averages forget the random weights quickly."""

    def __init__(self, model: nn.Module, max_decay: float = 0.999):
        shared = getattr(model, "tokenizer", None)  # a Llama's: it does not train, so it needs no copy
        self.model = copy.deepcopy(model, {id(shared): shared}).requires_grad_(False).eval()
        self.max_decay, self.updates = max_decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


class LossScaler:
    """float16 rounds gradients below 6e-8 to nothing, so the loss is multiplied by `scale` before the backward pass and
    the gradients are divided by it after. A step whose gradients overflowed is skipped and the scale halved; after 2000
    good ones in a row it doubles. With other precisions the scale is 1 and every step is taken."""

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good, self.skipped = enabled, 65536.0 if enabled else 1.0, 0, 0

    def takes(self, norm: float) -> bool:
        """Whether the step with this gradient norm is taken; adapts the scale."""
        if self.enabled and not math.isfinite(norm):
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
            return False
        self.good += 1
        if self.enabled and self.good % 2000 == 0:
            self.scale *= 2
        return True


def add_training_arguments(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    """The command line that both trainings share; a value of None is filled in from the preset's recipe."""
    add = parser.add_argument
    add("--data", help="folder with one sub-folder of images a class, or the word 'shapes'")
    add("--val", help="the same, held out: measured every --picture-every steps")
    add("--out", help="folder of the run; an existing run there is continued")
    add("--preset", default="tiny", choices=presets, help="model and recipe (default: tiny)")
    add("--steps", type=int, help="optimisation steps (default: the preset's)")
    add("--batch", type=int, help="images a step, over all processes (default: the preset's)")
    add("--micro-batch", type=int, help="images that one process takes at once; the rest is accumulated (default: all)")
    add("--lr", type=float, help="learning rate (default: the preset's)")
    add("--warmup", type=int, help="steps over which the rate rises from 0 (default: the preset's)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    add("--seed", type=int, default=0)
    choices = ["auto", "float32", "bfloat16", "float16"]
    add("--precision", default="auto", choices=choices, help="of products; auto: bfloat16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpoint-blocks", action="store_true", help="recompute activations in backward: less memory, more time")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--workers", type=int, help="processes that decode images (default: up to 8; 0 for images under 64 pixels)")
    add("--log-every", type=int, default=50)
    add("--picture-every", type=int, default=500)
    add("--save-every", type=int, default=500)
    add("--keep-every", type=int, default=0, help="keep a checkpoint every so many steps, step-N.pt (default: none)")
    add("--resume", default="auto", choices=["auto", "never"], help="go on with the run in --out if there is one")


def check_training_arguments(args: argparse.Namespace, recipe: dict, **least: float) -> None:
    """Fills in the recipe. Raises ValueError naming an argument that is missing or below its least value."""
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("data", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; --help lists all arguments")
    least |= dict.fromkeys(("steps", "batch", "micro_batch", "log_every", "picture_every", "save_every"), 1)
    least |= dict.fromkeys(("keep_every", "warmup", "workers", "seed", "lr", "clip"), 0)
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {bound}")


class TrainingRun:
    """A training: its folder (last.pt, the one before, log.csv, pictures), its optimisation step, resuming, stopping.
    args: the shared arguments. settings: {what: value} that must not change within a run (model, data). terms: names of
    the loss terms. columns: more of log.csv. Raises ValueError if the folder holds another run, naming what differs."""

    def __init__(self, args, processes: Processes, model, ema, optimizer, settings: dict, terms: list, columns: list):
        keep_freed_memory()
        self.args, self.processes, self.folder = args, processes, Path(args.out)
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.settings, self.terms = {"seed": args.seed, "batch": args.batch} | settings, ["loss", *terms]
        more = ["lr", "grad_norm", "images_per_s", "memory_mb", "unreadable", "skipped"]
        self.columns = ["step", *self.terms, *more, *columns]
        self.share, rest = divmod(args.batch, processes.world)
        if rest:
            raise ValueError(f"--batch {args.batch} cannot be shared equally by {processes.world} processes")
        self.micro = args.micro_batch or self.share
        if self.share % self.micro:
            raise ValueError(f"--micro-batch {self.micro} does not divide the {self.share} images of one process")
        fast = "bfloat16" if has_fast_bfloat16(processes.device) else "float32"
        self.dtype = getattr(torch, fast if args.precision == "auto" else args.precision)
        self.scaler = LossScaler(self.dtype == torch.float16)
        self.received = self.signal = 0  # a signal that reached this process; the one that all have agreed to stop for
        self.sums = torch.zeros(len(self.terms) + 1, dtype=torch.float64)  # of the terms and the gradient norm
        self.step = self.since = 0  # steps taken; steps taken at the log's last row
        if args.resume == "auto":
            self._restore()
        self.data, self.clock = None, (self.step, time.time())
        if processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("*.tmp"):  # of a process that was killed while it saved
                left_over.unlink()
            self._cut_log()
        for part in model.modules():
            if hasattr(part, "recompute"):
                part.recompute = args.checkpoint_blocks
        # What training calls, since only a call of the wrapper itself makes DDP exchange gradients.
        self.parallel = torch.compile(model) if args.compile else model
        if processes.world > 1:
            devices = [processes.device.index] if processes.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.parallel, devices, gradient_as_bucket_view=True)

    def steps(self) -> Iterator[int]:
        """Counts the steps; after each one it saves if due or at a signal, whose number + 128 is then the exit_code."""
        args = self.args
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember_signal)
        with tqdm(total=args.steps, initial=self.step, disable=self.processes.rank > 0, unit="step") as self.bar:
            while self.step < args.steps and not self.signal:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step % args.save_every == 0 or self.step == args.steps or self.signal:
                    self.save()
        self.processes.barrier()  # nobody leaves while the first process may still be saving
        self.exit_code = 128 + self.signal if self.signal else 0
        if self.signal and self.processes.rank == 0:
            print(f"stopped after step {self.step}, saved; the same command goes on", file=sys.stderr)

    def _remember_signal(self, number, frame) -> None:
        # A second Ctrl-C does not wait for the step to end. torchrun passes the first one on, so there it says nothing.
        if self.received == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.received = number

    def batches(self, samples: Samples) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
        """Yields each step's micro-batches, (uint8 images, labels, positions), of this process's share of the batch."""
        args, p, self.data = self.args, self.processes, samples.data
        first = (step * args.batch + p.rank * self.share for step in range(self.step, args.steps))
        positions = (range(f + i, f + i + self.micro) for f in first for i in range(0, self.share, self.micro))
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = args.workers if args.workers is not None else 0 if self.data.size < 64 else min(8, cores)
        options = dict(worker_init_fn=leave_signals_to_the_parent, pin_memory=p.device.type == "cuda")
        options |= dict(batch_sampler=positions, num_workers=workers)
        loader = iter(torch.utils.data.DataLoader(samples, **options))
        for _ in range(self.step, args.steps):
            chunks = []
            for _ in range(self.share // self.micro):
                images, labels, places, skipped = next(loader)
                for i in skipped.nonzero().flatten().tolist():
                    index = data_index(int(places[i]), len(self.data), samples.seed)
                    self.data.unreadable[torch.arange(index, index + int(skipped[i])) % len(self.data)] = 1
                chunks.append((images.to(p.device, non_blocking=True), labels.to(p.device), places))
            yield chunks

    def optimise(self, losses, chunks: list, rate: float) -> None:
        """One step at learning rate `rate`: gradients summed over the chunks (micro-batches) and clipped, weights
        averaged into the EMA. losses(chunk) returns {term: scalar}: together the loss, and summed over chunks and
        averaged over processes the batch's. Raises FloatingPointError, naming step and cause, before anything not
        finite can reach weights."""
        device, world = self.processes.device, self.processes.world
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(self.terms), device=device)
        for i, chunk in enumerate(chunks):
            with contextlib.ExitStack() as contexts:
                if device.type == "cpu":  # the fused attention's backward is slower there: 15% of a tiny step
                    contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
                if world > 1 and i + 1 < len(chunks):  # gradients are exchanged once a step, with the last chunk
                    contexts.enter_context(self.parallel.no_sync())
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    found = losses(chunk)
                loss = sum(found.values())
                (self.scaler.scale * loss).backward()
            totals += torch.stack([loss, *(found[name] for name in self.terms[1:])]).detach().float()
        if self.scaler.enabled:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], 1 / self.scaler.scale)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)

        # One message a step, the same for all: has a signal come, is the loss not finite, is the gradient?
        flags = torch.stack((torch.full_like(norm, self.received), ~totals[0].isfinite(), ~norm.isfinite()))
        self.signal, bad_loss, bad_norm = (int(flag) for flag in self.processes.reduce(flags, "MAX").tolist())
        norm = norm.item()
        if bad_loss or bad_norm and (not self.scaler.enabled or self.scaler.scale < 1e-3):
            values = (self.processes.reduce(totals) / world).tolist()
            what = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.terms, values))
            what = f"step {self.step + 1}: not finite ({what}, gradient norm {norm:.4g})"
            advice = "A lower --lr, a longer --warmup or another --precision may help"
            raise FloatingPointError(f"{what}; {self.folder} holds checkpoints from before it. {advice}")
        if self.scaler.takes(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
            self.sums[-1] += norm
        self.sums[:-1] += totals.double().cpu()

    def due(self, every: int) -> bool:
        """Whether the step that is being finished is one of every `every`, or the last."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.args.steps

    def row(self) -> dict | None:
        """A row of log.csv, means over the steps since the one before, if one is due or a picture is; else None."""
        if not self.due(self.args.log_every) and not self.due(self.args.picture_every):
            return None
        p, done, (before, since) = self.processes, self.step + 1, self.clock
        means = p.reduce(self.sums) / p.world / (done - self.since)
        row = {"step": done} | dict(zip([*self.terms, "grad_norm"], means.tolist()))
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "skipped": self.scaler.skipped}  # steps that overflowed
        row["images_per_s"] = self.args.batch * (done - before) / (time.time() - since)
        if p.device.type == "cuda":
            row["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        else:
            import resource  # which Windows does not have

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on a Mac bytes
            row["memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        if self.data is not None:
            self.data.unreadable = p.reduce(self.data.unreadable, "MAX")
            row["unreadable"] = int(self.data.unreadable.sum())
            self.data.refuse_if_corrupt()
        self.sums.zero_()
        self.since = done
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")
        return row

    def log(self, row: dict) -> None:
        """Appends a row to log.csv; columns without a value stay empty."""
        if self.processes.rank == 0:
            row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            with open(self.folder / "log.csv", "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        self.clock = (self.step + 1, time.time())  # pictures and measurements do not count as training

    def _cut_log(self) -> None:
        """log.csv goes back to the checkpoint's step: what was logged after it will happen again."""
        path, rows, text = self.folder / "log.csv", [], io.StringIO()
        if self.step and path.exists():
            with open(path, newline="", errors="replace") as file:
                rows = [row for row in csv.DictReader(file) if (row["step"] or "x").isdigit()]
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= self.step)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))

    def save(self) -> None:
        """Writes last.pt; the one before becomes previous.pt, and every --keep-every steps one stays as step-N.pt.
        last.pt is whole at every moment."""
        sums = self.processes.reduce(self.sums) / self.processes.world
        if self.processes.rank > 0:
            return
        training = {"step": self.step, "since": self.since, "sums": sums, "settings": self.settings}
        training |= {"optimizer": self.optimizer.state_dict(), "scaler": vars(self.scaler)}
        training["ema_updates"] = self.ema.updates if self.ema else 0
        new, last = self.folder / "new.pt", self.folder / "last.pt"
        save_checkpoint(new, self.model, self.ema.model if self.ema else None, training)
        if last.exists():
            _second_name(last, self.folder / "previous.pt")
        os.replace(new, last)
        if self.args.keep_every and self.step % self.args.keep_every == 0:
            _second_name(last, self.folder / f"step-{self.step}.pt")

    def _restore(self) -> None:
        """Goes on bit for bit from last.pt or, if that is not whole, previous.pt; in a new folder does nothing."""
        problems = []
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not path.exists():
                continue
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            training = checkpoint.get("training", {})
            before = training.get("settings", {})
            new = [f"{k} was {before.get(k)}, is {v}" for k, v in self.settings.items() if before.get(k) != v][:6]
            if new:
                raise ValueError(f"{path}: another run ({'; '.join(new)}); choose another --out, or --resume never")
            self.model.load_state_dict(checkpoint["model"])
            if self.ema:
                self.ema.model.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
                self.ema.updates = training["ema_updates"]
            self.optimizer.load_state_dict(training["optimizer"])
            vars(self.scaler).update(training["scaler"] | {"enabled": self.scaler.enabled})
            self.step, self.sums, self.since = training["step"], training["sums"].clone(), training["since"]
            return
        if problems:
            raise ValueError("; ".join(problems))


def _second_name(path: Path, name: Path) -> None:
    """Gives a file a second name, in place of what had it; a copy where the file system knows no links."""
    temporary = name.with_name(f"{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
