"""What the graded tests share: checks whose messages help, and models whose weights all matter."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dar


def check_close(promise: str, actual, expected, tolerance: float = 1e-4) -> None:
    """Tensors, or numbers, are equal but for rounding; also in shape."""
    kind = type(actual).__name__
    assert isinstance(actual, Tensor | float | int), f"{promise}: got a {kind}"
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    shape = list(actual.shape)
    assert actual.shape == expected.shape, f"{promise}: shape {shape}, not {list(expected.shape)}"
    if expected.numel() > 0:
        error = (actual - expected).abs().max().item()
        size = expected.abs().max().item()
        message = f"{promise}: up to {error:.3g} off, where numbers are up to {size:.3g}"
        assert error <= tolerance * max(size, 1), message


def check_equal(promise: str, actual, expected) -> None:
    """Whole numbers, lists of them, or words."""
    if isinstance(actual, Tensor):
        actual = actual.tolist()
    if isinstance(expected, Tensor):
        expected = expected.tolist()
    assert actual == expected, f"{promise}{first_difference(actual, expected)}"


def first_difference(actual, expected) -> str:
    """Of lists in lists, the first entry that differs, and its place."""
    place = ""
    while isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        i = next(i for i, (a, e) in enumerate(zip(actual, expected)) if a != e)
        place += f"[{i}]"
        actual, expected = actual[i], expected[i]
    return f"{place}: got {actual!r:.300}, not {expected!r:.300}"


def check_refused(promise: str, word: str, function: Callable, *args, **options) -> None:
    """A ValueError, whose message has the word in it."""
    try:
        result = function(*args, **options)
    except ValueError as error:
        assert word in str(error), f"{promise}: the message {str(error)!r} does not name {word!r}"
        return
    raise AssertionError(f"{promise}: no ValueError, but {result!r:.100}")


def randomize(module: nn.Module) -> nn.Module:
    """Random weights of ordinary size everywhere: in a fresh network many are 0 or 1, and there
    most claims would also hold for wrong code."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
        else:
            std = 0.5
        nn.init.normal_(parameter, std=std)
    return module.eval()


def make_tokenizer(**fields) -> dar.SequentialDiffusionTokenizer:
    """K = 4 groups of 2 tokens, pictures of 8 pixels."""
    small = {
        "image_size": 8,
        "encoder_patch": 4,
        "encoder_width": 64,
        "encoder_layers": 1,
        "decoder_width": 64,
        "decoder_layers": 1,
        "num_tokens": 8,
        "num_groups": 4,
        "codebook_size": 64,
        "diffusion_patch": 4,
        "diffusion_width": 64,
        "diffusion_layers": 1,
        "time_shift": 3.0,
        "data_scale": 0.5,
        "repa_layer": None,
    }
    return randomize(dar.SequentialDiffusionTokenizer(dar.TokenizerConfig(**small | fields)))
