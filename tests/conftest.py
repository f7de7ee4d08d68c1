"""What the test files share. Small networks with weights that all matter: fresh ones are the identity, or zero, in so
many places (gates, AdaLN, output layers) that most claims about them would hold for the wrong code too."""

import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "data")]  # dar.py and the scripts; synthetic.py

import synthetic  # noqa: E402
from command_lines import AR, BASELINE, draw_pictures, run  # noqa: E402

import dar  # noqa: E402

# The models here are small. On a busy machine two threads that wait for each other would take ten times as long as one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def randomize(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Gives every parameter a value that follows from its name and the seed, none of them zero; eval mode."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(synthetic.synthetic_weight(name, tuple(parameter.shape), seed)))
    return module.eval()


@pytest.fixture(scope="session")
def random_weights():
    """The function randomize, for modules that a test builds itself."""
    return randomize


@pytest.fixture(scope="session")
def golden_tokenizer() -> dict:
    return synthetic.load_golden("tokenizer_small.npz")


@pytest.fixture(scope="session")
def golden_ar() -> dict:
    return synthetic.load_golden("ar_small.npz")


@pytest.fixture(scope="session")
def released_dir(tmp_path_factory) -> Path:
    """A folder with tokenizer.pt and ar.pt laid out as the released checkpoints are, with the golden weights."""
    folder = tmp_path_factory.mktemp("released")
    synthetic.write_released_layout(folder)
    del sys.modules["config_util"]  # the module that nobody who loads such a file has
    return folder


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that builds small tokenizers with random weights, from the fields in which they differ."""

    def make(seed: int = 1, **fields) -> dar.SequentialDiffusionTokenizer:
        small = dict(
            image_size=32,
            encoder_patch=8,
            encoder_width=64,
            encoder_layers=2,
            decoder_width=128,
            decoder_layers=2,
            num_tokens=32,
            num_groups=8,
            codebook_size=64,
            diffusion_patch=4,
            diffusion_width=64,
            diffusion_layers=2,
            repa_layer=None,
            max_tokens=40,
        )
        return randomize(dar.SequentialDiffusionTokenizer(dar.TokenizerConfig(**small | fields)), seed)

    return make


@pytest.fixture(scope="session")
def make_ar():
    """A function that builds small Llamas with random weights, from the fields in which they differ."""

    def make(seed: int = 1, **fields) -> dar.ARTransformer:
        small = dict(width=128, layers=2, vocab_size=64, num_classes=10, num_tokens=32)
        return randomize(dar.ARTransformer(dar.ARConfig(**small | fields)), seed)

    return make


@pytest.fixture(scope="session")
def small_tokenizer(make_tokenizer) -> dar.SequentialDiffusionTokenizer:
    """32 pixels, N = 32 tokens in K = 8 groups, 64 codes. Shared: a test that changes it takes make_tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def small_ar(make_ar) -> dar.ARTransformer:
    """64 codes, 32 tokens, 10 classes: fits small_tokenizer. Shared: a test that changes it takes make_ar."""
    return make_ar()


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder with 24 pictures of 3 classes (data/), a tokenizer trained on them (tokenizer/), and a Llama (ar/)."""
    work = tmp_path_factory.mktemp("work")
    draw_pictures(work / "data")
    run(*BASELINE, *"--val shapes --out tokenizer --keep-every 2 --save-every 1".split(), cwd=work)
    run(*AR, *"--val data --tokenizer tokenizer/last.pt --out ar --steps 5 --ema --save-every 2".split(), cwd=work)
    return work


@pytest.fixture
def restore_signals():
    """A training takes SIGTERM and Ctrl-C for itself; afterwards they are the test run's again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
