"""Faster paths with the same results but for rounding. The models of dar.py know nothing of
them."""

import logging
import math
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dar

HAS_AMX = torch.cpu._is_amx_tile_supported()  # a processor's units for products of bfloat16


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, 2 to 4 times as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or HAS_AMX
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto, float32, bfloat16 or float16; auto is bfloat16 where it is fast, else float32."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return getattr(torch, name)


def prepare_for_sampling(model: nn.Module, compile: bool = False) -> nn.Module:
    """Makes a loaded model, and the tokenizer that it carries, fast to use, in place, and returns
    it. It can still be trained, saved, copied and moved. On a CPU, Linears keep a packed copy of
    their weights. compile: for many pictures on a GPU; a step of the Llama, or of the flow,
    becomes one CUDA graph."""
    use_fast_attention()
    if getattr(model, "tokenizer", None) is not None:
        prepare_for_sampling(model.tokenizer, compile)
    if compile and isinstance(model, dar.ARTransformer):
        model.__class__ = CompiledLlama
    elif compile:
        model.__class__ = CompiledTokenizer
    else:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = PackedLinear
    return model


# ------------------------------------------------------------------------------
# Packed weights


# What oneDNN takes: it refuses bfloat16 where the processor does not multiply it.
PACKED_DTYPES = set()
if torch.backends.mkldnn.is_available():
    PACKED_DTYPES.add(torch.float32)
    if has_fast_bfloat16(torch.device("cpu")):
        PACKED_DTYPES.add(torch.bfloat16)


class PackedLinear(nn.Linear):
    """A Linear that, on a CPU and without gradients, multiplies by a copy of its weight in oneDNN's
    own order: a product of a few rows takes a half to a tenth of the time. The copy is made at the
    first use, and again whenever the weight has changed (but a change through weight.data, which
    torch does not count either, is not seen)."""

    packed: Tensor | None = None
    packed_from: tuple = ()
    held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_be_packed(x):
            return super().forward(x)
        weight = self.weight
        version = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
        if self.packed_from != version:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.packed_from = version
            self.held = weight.detach()  # lest another weight be made at its address
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def can_be_packed(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        weight = self.weight
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        if x.device.type != "cpu" or x.dtype != weight.dtype or weight.is_inference():
            return False
        return weight.dtype in PACKED_DTYPES

    def __getstate__(self) -> dict:
        """For copy and pickle, which cannot copy oneDNN's tensors."""
        return without(self.__dict__, "packed", "packed_from", "held")


# ------------------------------------------------------------------------------
# Compiled steps


def quiet_compile(function: Callable, **options) -> Callable:
    """torch.compile, with fewer remarks and for many batch sizes."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
    torch._dynamo.config.recompile_limit = 256
    # A CPU is faster with eager mode's dropout.
    torch._inductor.config.fallback_random = not torch.cuda.is_available()
    return torch.compile(function, **options)


STEP = dict(mode="reduce-overhead", fullgraph=True, dynamic=False)  # of torch.compile: CUDA graphs


class CompiledLlama(dar.ARTransformer):
    """A Llama whose sampling step for one token is one CUDA graph. A graph reads and writes fixed
    memory. So the caches of one batch serve the next, unless they are still in use."""

    compiled_step: Callable | None = None
    kept: tuple[dar.KVCache, ...] = ()
    kept_for: tuple = ()  # shape, dtype and device of the kept caches
    user: Callable = staticmethod(lambda: None)  # weak reference to who has the kept caches

    def next_logits(self, x: Tensor, position: Tensor, caches: list[dar.KVCache]) -> Tensor:
        if x.shape[1] > 1:  # a class with a prefix, once a picture
            return super().next_logits(x, position, caches)
        if self.compiled_step is None:
            self.compiled_step = quiet_compile(super().next_logits, **STEP)
        return self.compiled_step(x, position, caches)

    def new_caches(self, batch: int, length: int) -> list[dar.KVCache]:
        weight = self.output.weight
        heads = self.config.width // dar.HEAD_DIM
        wanted = ((batch, heads, length, dar.HEAD_DIM), weight.dtype, weight.device)
        if self.kept_for != wanted or self.user() is not None:
            self.kept_for = wanted
            with torch.inference_mode(False):  # whose tensors could not be written outside of it
                self.kept = tuple(super().new_caches(batch, length))
        caches = []
        for cache in self.kept:
            torch._dynamo.mark_static_address(cache.k.zero_())
            torch._dynamo.mark_static_address(cache.v.zero_())
            caches.append(dar.KVCache(cache.k, cache.v))
        self.user = weakref.ref(caches[0])  # alive as long as whoever draws with it
        return caches

    def __getstate__(self) -> dict:
        """For copy and pickle: a copy compiles its own step."""
        return without(self.__dict__, "compiled_step", "kept", "kept_for", "user")


class CompiledTokenizer(dar.SequentialDiffusionTokenizer):
    """A tokenizer whose step of the flow is one CUDA graph."""

    compiled_step: Callable | None = None

    def velocity(self, x_t: Tensor, t: Tensor, group_z: Tensor) -> Tensor:
        if self.compiled_step is None:
            self.compiled_step = quiet_compile(super().velocity, **STEP)
        # One graph for all groups needs them contiguous; and the next call writes over its result.
        return self.compiled_step(x_t, t, group_z.contiguous()).clone()

    def __getstate__(self) -> dict:
        return without(self.__dict__, "compiled_step")


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


# ------------------------------------------------------------------------------
# Attention in bfloat16 on a CPU


def use_fast_attention() -> None:
    """From here on dar's models attend by attend_on_any_device."""
    dar.attend = attend_on_any_device


def attend_on_any_device(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """dar.attend by torch's kernel; or in plain products, where these are 2 to 9 times faster: for
    bfloat16 on a CPU, unless it has AMX and needs no gradient."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not on_cpu or (HAS_AMX and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q / math.sqrt(dar.HEAD_DIM)
    k = k.transpose(-1, -2).contiguous()
    v = v.contiguous()
    parts = []
    for i in range(0, q.shape[2], 128):  # queries at a time: scores stay in the processor's cache
        scores = q[:, :, i : i + 128] @ k
        if mask is not None:
            scores = scores.masked_fill(~mask[i : i + 128], -math.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2)
