"""What a training step costs a GPU, found without one: the models run on tensors that have shapes
but no memory (torch's FakeTensorMode), while every operation is counted."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dar

# Under autocast a GPU computes these in bfloat16, and these in float32. (PyTorch's list is longer.)
IN_BFLOAT16 = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
IN_FLOAT32 = {F.layer_norm, F.cross_entropy, F.mse_loss, F.cosine_similarity, torch.rsqrt}


@dataclasses.dataclass
class Cost:
    """Of one image in a training step."""

    saved: float = 0.0  # bytes that the forward pass keeps for the backward pass
    products: float = 0.0  # floating-point operations of matrix products and convolutions
    attention: float = 0.0  # floating-point operations of attention
    float32: float = 0.0  # floating-point operations of networks that run in float32 or TF32
    moved: float = 0.0  # bytes that the other operations read and write


class FusedAttention(torch.autograd.Function):
    """Attention as GPUs compute it: scores are never written, and the backward pass computes them
    again from queries, keys and values."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class CudaAutocast(TorchFunctionMode):
    """Casts as CUDA's autocast does, and counts attention."""

    def __init__(self, cost: Cost, weights: set[int], enabled: bool = True):
        super().__init__()
        self.cost = cost
        self.weights = weights  # addresses of storages; casts of weights are added
        self.enabled = enabled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            # Two products forward; backward computes one of them again and has four of its own.
            self.cost.attention += 7 * 2 * q.numel() * k.shape[2]
            return FusedAttention.apply(q, k, v)
        if self.enabled and function in IN_BFLOAT16:
            args = [self.cast(value, torch.bfloat16) for value in args]
        if self.enabled and function in IN_FLOAT32:
            args = [self.cast(value, torch.float32) for value in args]
        return function(*args, **kwargs)

    def cast(self, value, dtype: torch.dtype):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        result = value.to(dtype)
        if address(value) in self.weights:
            self.weights.add(address(result))
            ALIVE.append(result)
        return result


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


ALIVE = []  # tensors whose address was noted: while they live, no other tensor gets it


class Counter(TorchDispatchMode):
    """Counts products and bytes of all that runs, forward and backward."""

    FREE = ("empty_like", "_unsafe_view", "detach", "t")

    def __init__(self, cost: Cost):
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        inputs = [x for x in args if isinstance(x, Tensor)]
        outputs = [x for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor)]
        if name in ("mm", "addmm", "bmm"):
            self.cost.products += 2 * outputs[0].numel() * inputs[-1].shape[-2]
        elif name == "convolution":
            self.cost.products += 2 * outputs[0].numel() * inputs[1][0].numel()
        elif name == "convolution_backward":
            grad, _, weight = inputs[:3]
            self.cost.products += 2 * 2 * grad.numel() * weight[0].numel()
        elif outputs and not function.is_view and name not in self.FREE:
            self.cost.moved += sum(x.numel() * x.element_size() for x in inputs + outputs)
        return out


def count(step, cost: Cost, parameters: list[Tensor], autocast: bool = True) -> None:
    """Runs step() -> loss and its backward pass, and adds up its cost."""
    weights = {address(parameter) for parameter in parameters}
    seen = set()

    def note(tensor: Tensor) -> Tensor:
        if address(tensor) not in weights and address(tensor) not in seen:
            seen.add(address(tensor))
            ALIVE.append(tensor)
            cost.saved += tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with Counter(cost), CudaAutocast(cost, weights, autocast), hooks:
        step().backward()
    ALIVE.clear()


BATCH = 4  # images that are counted together: what does not grow with the batch counts little


def tokenizer_cost(config: dar.TokenizerConfig, times: int, lpips: bool, repa: bool) -> Cost:
    """Of one image in a step of train_tokenizer.py under bfloat16 autocast."""
    cost = Cost()
    with torch.device("meta"):  # which the random numbers of fresh weights need
        model = dar.SequentialDiffusionTokenizer(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images = torch.zeros(BATCH, 3, config.image_size, config.image_size)
        s = torch.zeros(BATCH, times)
        noise = torch.zeros(BATCH, times, *images.shape[1:])
        target = None
        if repa:
            grid = min(config.image_size // config.diffusion_patch, dar.DiffusionDecoder.REPA_GRID)
            target = torch.zeros(BATCH, grid**2, dar.DiffusionDecoder.REPA_WIDTH)

        def step() -> Tensor:
            out = model(images, s, noise)
            return sum(dar.tokenizer_loss(out, images, repa_target=target).values())

        count(step, cost, list(model.parameters()))
        if lpips:
            add_lpips(cost, images.repeat_interleave(times, 0))
    cost = per_image(cost)
    if repa:  # DINOv2 ViT-B/14, forward only: 86M weights, each used for 257 tokens
        cost.float32 += 2 * 86e6 * 257
    return cost


VGG_CHANNELS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)


def vgg_loss(x: Tensor) -> Tensor:
    """VGG-16's convolutions with a loss after each of its five stages, as in LPIPS."""
    loss = 0
    for channels in VGG_CHANNELS:
        for width in channels:
            x = F.relu(F.conv2d(x, torch.zeros(width, x.shape[1], 3, 3), padding=1))
        loss = loss + F.normalize(x, dim=1).square().mean()
        x = F.max_pool2d(x, 2)
    return loss


def add_lpips(cost: Cost, images: Tensor) -> None:
    """LPIPS in float32: forward on images and estimates, backward for the estimates."""
    network = Cost()
    estimates = images.clone().requires_grad_()
    count(lambda: vgg_loss(estimates), network, [], autocast=False)
    with torch.no_grad(), Counter(network):
        vgg_loss(images)
    cost.saved += network.saved
    cost.moved += network.moved
    cost.float32 += network.products


def ar_cost(config: dar.ARConfig) -> Cost:
    """Of one image in a step of train_ar.py under bfloat16 autocast, tokens at hand."""
    cost = Cost()
    with torch.device("meta"):
        model = dar.ARTransformer(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        codes = torch.zeros(BATCH, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(BATCH, dtype=torch.int64)
        count(lambda: dar.ar_loss(model, codes, labels), cost, list(model.parameters()))
    return per_image(cost)


def per_image(cost: Cost) -> Cost:
    return Cost(**{name: value / BATCH for name, value in dataclasses.asdict(cost).items()})


def weights_bytes(model: nn.Module, ema: bool) -> int:
    """Weights, gradients and Adam's two moments in float32; the average; and bfloat16 copies."""
    count = sum(p.numel() for p in model.parameters())
    return count * (16 + 4 * ema + 2)


def needed_bytes(model: nn.Module, ema: bool, cost: Cost, micro_batch: int) -> float:
    """Memory of a GPU in training. A tenth is added for what the allocator cannot fill."""
    return weights_bytes(model, ema) + 1.1 * micro_batch * cost.saved


def refuse_if_too_large(
    model: nn.Module, ema: bool, cost: Cost, micro_batch: int, available: float
) -> None:
    """Raises ValueError, before the first step, if a training does not fit into available bytes;
    it names the micro-batch that would."""
    needed = needed_bytes(model, ema, cost, micro_batch)
    if needed <= available:
        return
    smaller = micro_batch // 2
    while smaller > 0 and needed_bytes(model, ema, cost, smaller) > available:
        smaller //= 2
    advice = f"--micro-batch {smaller} fits" if smaller else "try --checkpoint-blocks"
    raise ValueError(
        f"--micro-batch {micro_batch} needs about {needed / 1e9:.0f} GB, the GPU has "
        f"{available / 1e9:.0f}; {advice}"
    )
