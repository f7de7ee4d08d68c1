"""Every path of the models on a GPU that is not there. In torch's FakeTensorMode a tensor has a
shape, a type and a device, but no memory. So a tensor may claim to be on "cuda", and an operation
between two devices raises here what it would raise there.

Not covered: the backward pass, which the mode cannot run; values, so checks of them and random
generators have stand-ins; and the GPU's kernels themselves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dar
import fid
from common import speed

GPU = torch.device("cuda", 0)


def zeros(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=GPU)


def numbers(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64)


def move(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces weights and buffers by fake ones on the GPU."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(zeros(*weight.shape)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, zeros(*buffer.shape, dtype=buffer.dtype))
    return model.eval()


@pytest.fixture
def models(monkeypatch):
    """In the mode, a Llama and a tokenizer. What needs values or a GPU's driver has a stand-in."""

    def no_generators(seeds, purpose, device):
        assert device == GPU, "another device"
        return [None] * len(seeds)

    def check_codes(name, codes, count, device, dims=2):
        assert codes.device == device == GPU, "another device"
        return codes

    schedule = dar.sampling_schedule(4, 4, 2.0, "ceil")
    monkeypatch.setattr(dar, "sampling_schedule", lambda *arguments: schedule)
    monkeypatch.setattr(dar, "picture_generators", no_generators)
    monkeypatch.setattr(dar, "check_codes", check_codes)
    monkeypatch.setattr(dar, "resolve_seeds", lambda seeds, count: [0] * count)
    with torch.device("meta"):  # before the mode, in which weights cannot be initialised
        ar = dar.ARTransformer(dar.ARConfig(128, 1, vocab_size=64, num_tokens=8))
        tokenizer = dar.SequentialDiffusionTokenizer(
            dar.TokenizerConfig(
                image_size=32,
                encoder_patch=8,
                encoder_layers=1,
                decoder_layers=1,
                num_tokens=8,
                num_groups=4,
                codebook_size=64,
                diffusion_patch=4,
                diffusion_layers=2,
                repa_layer=1,
            )
        )
    with FakeTensorMode(), torch.no_grad():
        yield move(ar), move(tokenizer)


def encode(ar, tokenizer):
    return tokenizer.quantize.nearest_code(tokenizer.encoder(zeros(2, 3, 32, 32)))


def decode(ar, tokenizer):
    return tokenizer.decode(numbers(2, 8))


def train_the_tokenizer(ar, tokenizer):
    images = zeros(2, 3, 32, 32)
    out = tokenizer(images, zeros(2, 3), code_noise=zeros(2, 8, 8))
    target = zeros(2, 64, 768)
    terms = dar.tokenizer_loss(out, images, repa_target=target)
    return sum(terms.values())


def train_the_llama(ar, tokenizer):
    return dar.ar_loss(ar, numbers(2, 8), numbers(2))


def generate(ar, tokenizer):
    return ar.generate(numbers(2), seeds=0, top_k=5, top_p=0.5, prefix=numbers(5))


def stream(ar, tokenizer):
    *_, last = dar.stream(ar, tokenizer, numbers(2), seeds=0, solver="euler")
    return last.preview


def stream_prepared(ar, tokenizer):
    speed.prepare_for_sampling(ar)
    speed.prepare_for_sampling(tokenizer)
    return stream(ar, tokenizer)


PATHS = [encode, decode, train_the_tokenizer, train_the_llama, generate, stream, stream_prepared]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_stays_on_its_device(models, path):
    assert path(*models).device == GPU


def test_inception_stays_on_its_device():
    with torch.device("meta"):
        inception = fid.InceptionV3()
    with FakeTensorMode(), torch.no_grad():
        for out in move(inception)(zeros(2, 3, 32, 32, dtype=torch.uint8)):
            assert out.device == GPU


# A function that each path calls, whose result is then on the CPU, as after a forgotten device=.
FORGOTTEN = [
    (encode, "rope_2d"),
    (decode, "causal_mask"),
    (train_the_tokenizer, "condition_group"),
    (train_the_llama, "rope_1d"),
    (generate, "gumbel_noise"),
    (stream, "initial_noise"),
    (stream_prepared, "causal_mask"),
]


@pytest.mark.parametrize("path, function", FORGOTTEN)
def test_a_forgotten_device_is_noticed(models, path, function, monkeypatch):
    right = getattr(dar, function)

    def wrong(*arguments):
        made = right(*arguments)
        if isinstance(made, torch.Tensor):
            return made.cpu()
        return (part.cpu() for part in made)

    monkeypatch.setattr(dar, function, wrong)
    with pytest.raises((RuntimeError, AssertionError), match="device"):
        path(*models)


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
