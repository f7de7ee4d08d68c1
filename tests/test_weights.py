"""Chapter 8, weights in files: ours, and the authors' in every form in which they leave them.

That loaded weights give the authors' numbers is tested with chapters 5 to 7, which load them."""

import argparse
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import dar


def assert_same(loaded, model, dtype=torch.float32):
    """Both have the same config and weights, in this dtype."""
    assert loaded.config == model.config
    assert not loaded.training
    loaded = loaded.state_dict()
    assert list(loaded) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], weight.to(dtype)), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


# Ours


@pytest.fixture
def bundle(path, make_ar, make_tokenizer):
    """A Llama that carries a tokenizer and class names, and is saved."""
    ar = make_ar(num_classes=3)
    ar.attach_tokenizer(make_tokenizer())
    ar.class_names = ["ant", "bee", "cat"]
    dar.save_checkpoint(path, ar)
    return ar


def test_a_tokenizer_returns_as_it_was(path, make_tokenizer):
    tokenizer = make_tokenizer(num_steps=5, data_scale=0.7, repa_layer=1).train()
    dar.save_checkpoint(path, tokenizer)
    assert_same(dar.load_tokenizer(path), tokenizer)


def test_a_llama_returns_with_what_it_carries(path, bundle):
    loaded = dar.load_ar(path)
    assert_same(loaded, bundle)
    assert_same(loaded.tokenizer, bundle.tokenizer)
    assert loaded.class_names == ["ant", "bee", "cat"]


def test_a_llamas_file_also_gives_its_tokenizer(path, bundle):
    assert_same(dar.load_tokenizer(path), bundle.tokenizer)


def test_a_given_tokenizer_takes_the_place_of_the_files(path, bundle, small_tokenizer):
    assert dar.load_ar(path, tokenizer=small_tokenizer).tokenizer is small_tokenizer


def test_averaged_weights_are_preferred(path, make_ar):
    average = make_ar(seed=2)
    dar.save_checkpoint(path, make_ar(), ema=average, training={"step": 3})
    assert_same(dar.load_ar(path), average)
    assert dar.read_checkpoint(path)["training"] == {"step": 3}


def test_a_dtype_may_be_chosen_on_saving(path, bundle):
    dar.save_checkpoint(path, bundle, dtype=torch.bfloat16)
    loaded = dar.load_ar(path)
    assert_same(loaded, bundle, torch.bfloat16)
    assert_same(loaded.tokenizer, bundle.tokenizer, torch.bfloat16)


def test_dtype_device_and_tokenizer_may_be_words(path, tmp_path, bundle):
    dar.save_checkpoint(path, bundle)
    dar.save_checkpoint(tmp_path / "tokenizer.pt", bundle.tokenizer)
    loaded = dar.load_ar(path, "cpu", "bfloat16", str(tmp_path / "tokenizer.pt"))
    assert loaded.output.weight.dtype == torch.bfloat16
    assert loaded.tokenizer.device == torch.device("cpu")
    with pytest.raises(ValueError, match="dtype float99: expected float32, bfloat16, float16"):
        dar.load_ar(path, dtype="float99")
    with pytest.raises(ValueError, match="device 'gpu': expected cpu, cuda"):
        dar.load_ar(path, device="gpu")


def test_the_tokenizer_goes_where_its_llama_goes(bundle):
    bundle.to(torch.bfloat16).to("meta")
    weight = bundle.tokenizer.diffusion.patch_in.weight
    assert (weight.dtype, weight.device.type) == (torch.bfloat16, "meta")


def test_a_dtype_may_be_chosen_on_loading(path, bundle):
    loaded = dar.load_ar(path, dtype=torch.bfloat16)
    assert_same(loaded, bundle, torch.bfloat16)
    assert_same(loaded.tokenizer, bundle.tokenizer, torch.bfloat16)


def test_our_files_hold_plain_data(path, bundle):
    data = torch.load(path, weights_only=True)
    assert data["format"] == "dar-1"
    assert data["kind"] == "ar"
    assert data["config"] == dataclasses.asdict(bundle.config)


def test_a_loaded_model_needs_its_file_no_more(path, bundle):
    loaded = dar.load_ar(path)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(bytes(size))  # what is still mapped would change
    assert_same(loaded, bundle)


# The authors'


THEIR_NAMES = {
    "quant_in.": "quant_in_conv.",
    "quant_out.": "quant_out_conv.",
    "diffusion.": "diff_decoder.net.",
    "net.patch_in.": "net.conv_in.",
    "net.patch_out.": "net.conv_out.",
    "net.repa_head.": "net.repa_out.",
    "cls_embedding.": "cls_embedding.embedding_table.",
}


def released(model) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names and in their shapes."""
    state = {}
    for name, weight in model.state_dict().items():
        if name.startswith(("quant_", "diffusion.patch_")) and weight.ndim == 2:
            weight = weight[:, :, None, None]  # 1x1 convolutions
        for ours, theirs in THEIR_NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = weight.clone()
    return state


def released_settings(**changes) -> dict:
    """What their config says of the tokenizer below."""
    diffusion = dict(dim=64, patch_size=4, depth=2, data_std=0.5, time_shift=3.0)
    settings = dict(num_query_groups=4, num_all_queries=16, num_denoising_steps=5, vq_enable=True)
    for name, value in changes.items():
        where = diffusion if name in diffusion else settings
        where[name] = value
    return settings | {"diff_decoder": diffusion}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    """With the fields that a file of theirs does not tell as its loading sets them."""
    return make_tokenizer(
        image_size=256,
        num_tokens=16,
        num_groups=4,
        num_steps=5,
        data_scale=0.5,
        time_shift=3.0,
        group_rule="nearest",
    )


def test_a_released_file_has_their_settings(authors_tokenizer, authors_ar):
    """Of the class that their config is, nothing is known here."""
    c = authors_tokenizer.config
    assert (c.num_tokens, c.num_groups, c.group_rule) == (32, 8, "nearest")
    assert (c.data_scale, c.time_shift) == (0.6, 2.0)
    assert (c.diffusion_layers, c.repa_layer) == (3, 1)
    assert authors_ar.config == dar.ARConfig(128, 3, 256, num_classes=10, num_tokens=32)


def test_a_whole_released_training_loads(path, tokenizer):
    state = released(tokenizer)
    data = {
        "model": {name: weight + 1 for name, weight in state.items()},
        "ema": state | {"quantize.codebook_used": torch.zeros(65536)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4}]},
        "discriminator": {"weight": torch.zeros(3)},
        "steps": 210000,
        "args": argparse.Namespace(lr=2e-4),
        "config": {"model": released_settings()},
    }
    torch.save(data, path)
    assert_same(dar.load_tokenizer(path), tokenizer)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["model", "ema", None])
def test_a_released_llama_loads_in_every_form(path, small_ar, prefix, part):
    """From DDP and torch.compile, as the averaged weights alone, as a bare state dict."""
    state = {prefix + name: weight for name, weight in released(small_ar).items()}
    torch.save(state if part is None else {part: state}, path)
    assert_same(dar.load_ar(path, num_tokens=32), small_ar)


def test_a_bare_state_dict_has_v1s_settings(path, make_tokenizer):
    torch.save(released(make_tokenizer(max_tokens=256)), path)
    config = dar.load_tokenizer(path).config
    sizes = dict(
        encoder_patch=8,
        encoder_width=64,
        encoder_layers=2,
        decoder_width=128,
        decoder_layers=2,
        codebook_size=64,
        diffusion_patch=4,
        diffusion_width=64,
        diffusion_layers=2,
        repa_layer=None,
        max_tokens=256,
    )
    v1 = dar.TOKENIZER_PRESETS["v1"]
    assert config == dataclasses.replace(v1, **sizes, group_rule="nearest")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vq_enable": False}, "vq_enable"),
        ({"mlp_head": True}, "mlp_head"),
        ({"share_time_encoding": True}, "share_time_encoding"),
        ({"num_all_queries": 18}, "N = 18"),
        ({"num_query_groups": "four"}, "four|str"),
        ({"time_shift": -1.0}, "time_shift=-1"),
    ],
    ids=str,
)
def test_settings_that_were_never_released_are_refused(path, tokenizer, changes, message):
    config = {"model": released_settings(**changes)}
    torch.save({"model": released(tokenizer), "config": config}, path)
    with pytest.raises(ValueError, match=f"x.pt.*({message})"):
        dar.load_tokenizer(path)


def test_n_comes_from_the_tokenizer_else_the_caller(released_dir, authors_tokenizer):
    path = released_dir / "ar.pt"
    assert dar.load_ar(path, tokenizer=authors_tokenizer).config.num_tokens == 32
    assert dar.load_ar(path, num_tokens=64).config.num_tokens == 64
    assert dar.load_ar(path).config.num_tokens == 256


# The file of the lesson alone


ALONE = """
import sys, torch
before = set(sys.modules)
import dar
imported = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert imported <= {{"dar", "torch"}} | set(sys.stdlib_module_names)
assert dar.__file__.startswith({folder!r})

for config in dar.TOKENIZER_PRESETS.values():
    with torch.device("meta"):
        dar.SequentialDiffusionTokenizer(config)
for config in dar.AR_PRESETS.values():
    with torch.device("meta"):
        dar.ARTransformer(config)

released = dar.load_tokenizer({released!r})
codes = released.encode(torch.zeros(1, 3, 256, 256))
assert released.decode(codes, torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)

ar = dar.ARTransformer(dar.AR_PRESETS["shapes"])
ar.attach_tokenizer(dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS["shapes"]))
dar.save_checkpoint("ar.pt", ar)
ar = dar.load_ar("ar.pt")
*_, last = dar.stream(ar, ar.tokenizer, torch.tensor([2]))
assert last.x.shape == (1, 3, 16, 16)
"""


def test_dar_alone_in_a_folder_does_it_all(tmp_path, released_dir):
    shutil.copy(dar.__file__, tmp_path)
    program = ALONE.format(folder=str(tmp_path), released=str(released_dir / "tokenizer.pt"))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
