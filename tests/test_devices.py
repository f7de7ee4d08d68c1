"""Every path of the models on a GPU that is not there. In torch's FakeTensorMode a tensor has a shape, a type and a
device, but no memory. So a tensor may claim to be on "cuda", and an operation between two devices raises here what it
would raise there.

Not covered: the backward pass, which the mode cannot run; averages and optimizers, whose operations on lists of tensors
it does not look at; values, so checks of them and random generators have stand-ins; and CUDA's kernels themselves.
"""

import copy

import lpips
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dar
import fid
import train_tokenizer
from experiments import classifier

B = 2
GPU = torch.device("cuda", 0)


def zeros(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=GPU)


def numbers(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its weights and buffers replaced by fake ones on the GPU."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(zeros(*value.shape, dtype=value.dtype))
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = zeros(*value.shape, dtype=value.dtype)
    return model


@pytest.fixture(scope="module")
def machine(make_tokenizer, make_ar) -> tuple[FakeTensorMode, list[torch.nn.Module]]:
    """The mode, and models in it: tokenizer, Llama, VGG for LPIPS, the small classifier, Inception."""
    vgg = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    models = make_tokenizer(repa_layer=1), make_ar(), vgg, classifier.Classifier(10), fid.InceptionV3()
    with FakeTensorMode() as mode:
        return mode, [moved(model.eval()) for model in models]


@pytest.fixture
def gpu(machine, monkeypatch):
    """The models, in the mode. What needs values or a GPU's driver has a stand-in."""

    def no_generators(seeds, purpose, device):
        assert device == GPU, "another device"
        return [None] * len(seeds)

    def right_device_and_type(what, found, dims, count, most=2**31):
        assert found.device == GPU and found.dtype == torch.int64 and found.ndim == dims, "another device"

    monkeypatch.setattr(dar, "picture_generators", no_generators)
    monkeypatch.setattr(dar, "check_numbers", right_device_and_type)
    check_shape = dar.check_pixels
    monkeypatch.setattr(dar, "check_pixels", lambda images, what, patch, most=0: check_shape(images, what, patch))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with machine[0], torch.no_grad():
        yield machine[1]


def denoise(tokenizer, ar, *networks):
    return tokenizer.decode(numbers(B, 32))


def train_the_tokenizer(tokenizer, ar, vgg, judge, inception):
    images = zeros(B, 3, 32, 32)
    out = tokenizer(images, zeros(B, 3), code_noise=zeros(B, 32, 8))
    target = zeros(B, 64, 768)
    distance = classifier.PerceptualDistance(judge)
    losses = dar.tokenizer_loss(out, images, train_tokenizer.in_float32(vgg), 0.5, target)
    losses["judge"] = dar.tokenizer_loss(out, images, distance)["lpips"]
    return sum(losses.values())


def train_the_llama(tokenizer, ar, *networks):
    return dar.ar_loss(ar, numbers(B, 32), numbers(B), zeros(B).bool(), ar.config.num_classes)


def prepared(tokenizer, ar, *networks):
    *_, last = dar.stream(dar.prepare_for_sampling(ar), dar.prepare_for_sampling(tokenizer), numbers(B), seeds=0)
    return last.x


def kept_caches(tokenizer, ar, *networks):
    ar = copy.copy(ar)
    ar.new_caches = dar.KeptCaches(ar.new_caches)  # as --compile keeps them
    return ar.generate(numbers(B), seeds=0)


def stream(tokenizer, ar, *networks):
    *_, last = dar.stream(ar, tokenizer, numbers(B), seeds=0, num_steps=12, solver="euler", top_k=5, top_p=0.9)
    return last.preview


def metrics(tokenizer, ar, vgg, judge, inception):
    pool, spatial, logits = inception(zeros(B, 3, 32, 32, dtype=torch.uint8))
    total = fid.moments(pool, fid.moments(pool))
    return fid.merge_moments(total, total)[2] + spatial.sum() + logits.sum()


PATHS = {
    "encode": lambda tokenizer, *_: tokenizer.encode(zeros(B, 3, 32, 32)),
    "decode": denoise,
    "previews": lambda tokenizer, *_: tokenizer.previews(numbers(B, 8), num_steps=16),
    "tokenizer training": train_the_tokenizer,
    "Llama training": train_the_llama,
    "greedy": lambda tokenizer, ar, *_: ar.generate(numbers(B), greedy=True, cfg=None),
    "guided": lambda tokenizer, ar, *_: ar.generate(numbers(B), seeds=0, top_k=5, top_p=0.5),
    "prefix": lambda tokenizer, ar, *_: ar.generate(numbers(B), seeds=0, prefix=numbers(5)),
    "stream": stream,
    "prepared": prepared,
    "kept caches": kept_caches,
    "metrics": metrics,
}


@pytest.mark.parametrize("path", PATHS)
def test_no_operation_meets_a_tensor_of_another_device(gpu, path):
    assert PATHS[path](*gpu).device == GPU


# A function that each path calls, whose result is then on the CPU, as after a forgotten device=.
FORGOTTEN = {
    "encode": "rope_2d",
    "decode": "rope_2d",
    "previews": "causal_mask",
    "tokenizer training": "condition_group",
    "Llama training": "rope_1d",
    "greedy": "causal_mask",
    "guided": "gumbel_noise",
    "prefix": "rope_1d",
    "stream": "initial_noise",
    "prepared": "initial_noise",
    "kept caches": "gumbel_noise",
}


@pytest.mark.parametrize("path", FORGOTTEN)
def test_a_tensor_that_was_made_on_the_cpu_is_noticed(gpu, path, monkeypatch):
    right = getattr(dar, FORGOTTEN[path])

    def wrong(*arguments):
        made = right(*arguments)
        return made.cpu() if isinstance(made, torch.Tensor) else (part.cpu() for part in made)

    monkeypatch.setattr(dar, FORGOTTEN[path], wrong)
    with pytest.raises((RuntimeError, AssertionError), match="device"):
        PATHS[path](*gpu)


def test_features_that_were_made_on_the_cpu_are_noticed(gpu, monkeypatch):
    monkeypatch.setattr(fid, "resize_tf1", lambda x: torch.zeros(len(x), 3, 299, 299))
    with pytest.raises(RuntimeError, match="device"):
        PATHS["metrics"](*gpu)


def test_random_numbers_are_drawn_where_the_labels_are(monkeypatch):
    asked = []

    class Generator:
        def __init__(self, device):
            asked.append(device)

        def manual_seed(self, seed):
            return self

    monkeypatch.setattr(torch, "Generator", Generator)
    dar.picture_generators([3, 4], 0, GPU)
    assert asked == [GPU, GPU]
