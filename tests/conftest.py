"""What the test files share: small models whose weights all matter. Fresh ones are the identity, or
zero, in so many places (gates, AdaLN, output layers) that wrong code would pass most tests too."""

import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "data")]  # dar.py and the scripts; synthetic.py

import synthetic  # noqa: E402

import dar  # noqa: E402

torch.set_num_threads(1)  # Models are small, and threads that wait for each other take longer.


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def randomize(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Gives each parameter a value that follows from its name and the seed; eval mode."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = synthetic.synthetic_weight(name, tuple(parameter.shape), seed)
            parameter.copy_(torch.from_numpy(value))
    return module.eval()


@pytest.fixture(scope="session")
def random_weights():
    """The function randomize, for modules that a test builds itself."""
    return randomize


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that builds small tokenizers, from the fields in which they differ."""

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
        config = dar.TokenizerConfig(**small | fields)
        return randomize(dar.SequentialDiffusionTokenizer(config), seed)

    return make


@pytest.fixture(scope="session")
def make_ar():
    """A function that builds small Llamas, from the fields in which they differ."""

    def make(seed: int = 1, **fields) -> dar.ARTransformer:
        small = dict(width=128, layers=2, vocab_size=64, num_classes=10, num_tokens=32)
        return randomize(dar.ARTransformer(dar.ARConfig(**small | fields)), seed)

    return make


@pytest.fixture(scope="session")
def small_tokenizer(make_tokenizer) -> dar.SequentialDiffusionTokenizer:
    """32 pixels, N = 32 tokens in K = 8 groups, 64 codes. A test that changes it makes its own."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def small_ar(make_ar) -> dar.ARTransformer:
    """64 codes, 32 tokens, 10 classes: fits small_tokenizer. A test that changes it makes its
    own."""
    return make_ar()


# The authors' implementation on weights that follow from a seed: golden numbers, and files


@pytest.fixture(scope="session")
def golden_tokenizer() -> dict:
    return synthetic.load_golden("tokenizer_small.npz")


@pytest.fixture(scope="session")
def golden_ar() -> dict:
    return synthetic.load_golden("ar_small.npz")


@pytest.fixture(scope="session")
def released_dir(tmp_path_factory) -> Path:
    """A folder with tokenizer.pt and ar.pt, laid out as the released files are."""
    folder = tmp_path_factory.mktemp("released")
    synthetic.write_released_layout(folder)
    del sys.modules["config_util"]  # a module that nobody has who loads such a file
    return folder


@pytest.fixture(scope="session")
def authors_tokenizer(released_dir) -> dar.SequentialDiffusionTokenizer:
    return dar.load_tokenizer(released_dir / "tokenizer.pt")


@pytest.fixture(scope="session")
def authors_ar(released_dir) -> dar.ARTransformer:
    return dar.load_ar(released_dir / "ar.pt", num_tokens=32)


# Trainings


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder with 24 pictures of 3 classes (data/), a tokenizer trained on them (tokenizer/), and
    a Llama (ar/)."""
    from command_lines import AR, BASELINE, call, draw_pictures  # not needed to test a chapter

    work = tmp_path_factory.mktemp("work")
    draw_pictures(work / "data")
    tokenizer = "--val shapes --out tokenizer --keep-every 2 --save-every 1"
    call(*BASELINE, *tokenizer.split(), cwd=work)
    ar = "--val data --tokenizer tokenizer/last.pt --out ar --steps 5 --ema --save-every 2"
    call(*AR, *ar.split(), cwd=work)
    return work


@pytest.fixture
def restore_signals():
    """A training takes SIGTERM and Ctrl-C for itself; afterwards they are the test run's again."""
    from common.training import STOP_SIGNALS  # not needed to test a chapter

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
