"""Chapter 9: the authors' released layout and our own format, and every way in which a file can be wrong."""

import argparse
import dataclasses
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from functools import partial
from pathlib import Path

import pytest
import synthetic
import torch

import dar

ROOT = Path(dar.__file__).resolve().parent


# Files to load


RELEASED_NAMES = (
    ("quant_in.", "quant_in_conv."),
    ("quant_out.", "quant_out_conv."),
    ("diffusion.patch_in.", "diff_decoder.net.conv_in."),
    ("diffusion.patch_out.", "diff_decoder.net.conv_out."),
    ("diffusion.repa_head.", "diff_decoder.net.repa_out."),
    ("diffusion.", "diff_decoder.net."),
    ("cls_embedding.", "cls_embedding.embedding_table."),
)


def released_state(model) -> dict:
    """A model's weights under the authors' names and in their shapes."""
    state = {}
    for name, weight in model.state_dict().items():
        if name.startswith(("quant_", "diffusion.patch_")) and weight.ndim == 2:
            weight = weight[:, :, None, None]  # 1x1 convolutions
        for ours, theirs in RELEASED_NAMES:
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        state[name] = weight.clone()
    return state


def released_config(**changes) -> dict:
    """The settings that the authors' file carries, for the tokenizer below."""
    diffusion = dict(in_dim=3, out_dim=3, dim=64, cond_dim=64, patch_size=4, depth=2, data_std=0.5, time_shift=3)
    config = dict(num_query_groups=4, num_all_queries=8, num_denoising_steps=4, vq_enable=True, vq_codebook_size=16)
    for name, value in changes.items():
        (diffusion if name in diffusion or name in ("mlp_head", "share_time_encoding", "repa_layer") else config)[
            name
        ] = value
    return {**config, "diff_decoder": diffusion}


def save_released(path, data, config=None) -> Path:
    """torch.save, with the config as the instance of a class that the loading machine does not have."""
    module = types.ModuleType("config_util")
    module.Config = type("Config", (), {"__module__": "config_util", "__qualname__": "Config"})
    sys.modules["config_util"] = module
    try:
        if config is not None:
            instance = module.Config()
            instance._data = config
            data = data | {"config": instance}
        torch.save(data, path)
    finally:
        del sys.modules["config_util"]
    return Path(path)


def plus_one(state: dict) -> dict:
    return {name: weight + 1 for name, weight in state.items()}


def assert_same_weights(loaded, state: dict, dtype=torch.float32):
    loaded = loaded.state_dict()
    assert loaded.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(loaded[name], weight.to(dtype)), name


def one_line(error) -> str:
    message = str(error.value)
    assert message.strip() and len(message.splitlines()) == 1
    return message


def refusal(load, path: Path, kind=ValueError) -> str:
    """The one line, naming the file, with which load(path) fails."""
    with pytest.raises(kind) as error:
        load(path)
    assert str(path) in one_line(error)
    return str(error.value)


@pytest.fixture(scope="module")
def tiny_tokenizer(make_tokenizer):
    return make_tokenizer(
        image_size=256, encoder_width=64, encoder_layers=1, decoder_width=64, decoder_layers=1, diffusion_layers=2,
        num_tokens=8, num_groups=4, codebook_size=16, max_tokens=256, data_scale=0.5, time_shift=3, num_steps=4,
        group_rule="nearest",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny_ar(make_ar):
    return make_ar(width=64, layers=2, vocab_size=16, num_classes=3, num_tokens=8)


@pytest.fixture()
def bundle(tmp_path, tiny_ar, tiny_tokenizer) -> Path:
    """A file in our own format: a Llama, its tokenizer and class names."""
    return save_bundle(tmp_path / "bundle.pt", tiny_ar, tiny_tokenizer)


def save_bundle(path, ar, tokenizer) -> Path:
    ar.attach_tokenizer(tokenizer)
    ar.class_names = ["cat", "dog", "house"]
    dar.save_checkpoint(path, ar)
    ar.attach_tokenizer(None)
    ar.class_names = None
    return path


# The authors' layout agrees with the golden files


@torch.no_grad()
def test_released_tokenizer_agrees_with_the_authors(released_dir, golden_tokenizer):
    golden = {k: torch.from_numpy(v) for k, v in golden_tokenizer.items() if getattr(v, "ndim", 0)}
    tokenizer = dar.load_tokenizer(released_dir / "tokenizer.pt")
    assert not tokenizer.training
    codes = golden["codes"].long()
    assert torch.equal(tokenizer.encode(golden["images_u8"].float() / 127.5 - 1), codes)
    torch.testing.assert_close(tokenizer.condition(codes), golden["cond"], rtol=1e-4, atol=1e-4)

    noise = synthetic.initial_noise(golden_tokenizer, 2, 128)
    pictures = {
        name: tokenizer.decode(codes, noise, steps, solver)
        for name, steps, solver in (
            ("adams2_8", None, "ab2"),
            ("euler_8", 8, "euler"),
            ("adams2_4", 4, "ab2"),
            ("adams2_12", 12, "ab2"),
        )
    }
    pictures["euler_8_clip4"] = tokenizer.previews(codes, noise, solver="euler")[3]
    for name, picture in pictures.items():
        scale = golden[name].abs().max()
        error = (picture[:, :, ::2, ::2] - golden[name]).abs().max() / scale
        assert error < 1e-4, f"{name}: {error}"


@torch.no_grad()
def test_released_ar_agrees_with_the_authors(released_dir, golden_ar):
    golden = {k: torch.from_numpy(v) for k, v in golden_ar.items() if getattr(v, "ndim", 0)}
    ar = dar.load_ar(released_dir / "ar.pt", num_tokens=32)
    assert not ar.training and ar.tokenizer is None
    logits = ar(golden["idx"].long(), golden["labels"].long())
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    codes = ar.generate(golden["labels"].long(), cfg=(1.1, 4.0), greedy=True)
    assert torch.equal(codes, golden["greedy"].long())


def test_n_comes_from_the_tokenizer_else_the_caller_else_256(released_dir):
    tokenizer = dar.load_tokenizer(released_dir / "tokenizer.pt")
    assert dar.load_ar(released_dir / "ar.pt", tokenizer=tokenizer).config.num_tokens == 32
    assert dar.load_ar(released_dir / "ar.pt", num_tokens=64).config.num_tokens == 64
    ar = dar.load_ar(released_dir / "ar.pt")
    assert ar.config == dar.ARConfig(width=128, layers=3, vocab_size=256, num_classes=10, num_tokens=256)


# Every variant of the authors' layout


@pytest.mark.parametrize("kept", ["model and ema", "model", "model, no ema", "ema", "a whole training"])
def test_averaged_weights_win_whatever_else_a_released_file_holds(tmp_path, tiny_tokenizer, tiny_ar, kept):
    for load, model in ((dar.load_tokenizer, tiny_tokenizer), (dar.load_ar, tiny_ar)):
        state, whole = released_state(model), kept == "a whole training"
        if model is tiny_tokenizer:
            state["quantize.codebook_used"] = torch.zeros(65536)
        data = {"model": plus_one(state) if whole or kept == "model and ema" else state, "ema": state}
        data = {"ema": state} if kept == "ema" else {"model": state} if kept == "model" else data
        data |= {"ema": None} if kept == "model, no ema" else {}
        if whole:
            optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4}]}
            args = argparse.Namespace(gpt_model="GPT-XXL", num_classes=1000, vocab_size=16384)  # says nothing true
            data |= {"optimizer": optimizer, "discriminator": {"weight": torch.zeros(3)}, "steps": 1, "args": args}
        config = {"model": released_config()} if model is tiny_tokenizer else None
        more = {} if model is tiny_tokenizer else {"num_tokens": 8}
        loaded = load(save_released(tmp_path / "x.pt", data, config), **more)
        assert_same_weights(loaded, model.state_dict())
        assert loaded.config == model.config


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [True, False], ids=["in a file", "bare"])
def test_prefixes_of_ddp_and_compile_are_taken_off(tmp_path, tiny_tokenizer, tiny_ar, prefix, nested):
    for load, model in ((dar.load_tokenizer, tiny_tokenizer), (dar.load_ar, tiny_ar)):
        state = {prefix + name: weight for name, weight in released_state(model).items()}
        state |= {prefix + "quantize.codebook_used": torch.zeros(9)} if model is tiny_tokenizer else {}
        torch.save({"model": state} if nested else state, tmp_path / "x.pt")
        assert_same_weights(load(tmp_path / "x.pt"), model.state_dict())


def test_a_bare_state_dict_is_v1_but_for_widths_and_depths(tmp_path, tiny_tokenizer):
    torch.save(released_state(tiny_tokenizer), tmp_path / "x.pt")
    config = dar.load_tokenizer(tmp_path / "x.pt").config
    assert (config.num_tokens, config.num_groups, config.num_steps or 8) == (256, 8, 8)
    assert (config.data_scale, config.time_shift, config.group_rule) == (0.6, 2.0, "nearest")
    assert (config.encoder_width, config.encoder_layers, config.encoder_patch) == (64, 1, 8)
    assert (config.decoder_width, config.decoder_layers, config.diffusion_width) == (64, 1, 64)
    assert (config.diffusion_layers, config.diffusion_patch, config.codebook_size) == (2, 4, 16)
    assert (config.image_size, config.code_dim, config.max_tokens, config.repa_layer) == (256, 8, 256, None)


@pytest.mark.parametrize("form", ["object", "dict", "dict without model"])
def test_the_config_is_read_in_each_form_and_what_it_says_besides_ignored(tmp_path, tiny_tokenizer, form):
    data = {"model": released_state(tiny_tokenizer)}
    config = released_config(num_denoising_steps=3, data_std=1.0, mlp_head=False, dropout=0.3, name="x", nested={})
    if form == "object":
        save_released(tmp_path / "x.pt", data, {"model": config, "optimizer": {"lr": 1}})
    else:
        torch.save(data | {"config": {"model": config} if form == "dict" else config}, tmp_path / "x.pt")
    expected = dataclasses.replace(tiny_tokenizer.config, num_steps=3, data_scale=1.0)
    assert dar.load_tokenizer(tmp_path / "x.pt").config == expected


def test_without_a_step_count_the_config_means_one_step_a_group(tmp_path, tiny_tokenizer):
    config = released_config(num_query_groups=2)
    del config["num_denoising_steps"]
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, {"model": config})
    tokenizer = dar.load_tokenizer(path)
    assert len(tokenizer.previews(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 3, 32, 32))) == 2


@pytest.mark.parametrize(
    "config, named",
    [
        ({"model": released_config(num_all_queries=9)}, "9"),  # not divisible by K = 4
        ({"model": released_config(num_all_queries=260)}, "260"),  # the tables have 256 rows
        ({"model": released_config(num_query_groups="four")}, "four"),
        ({"model": released_config(time_shift=-1)}, "-1"),
        ({"model": released_config(data_std=None)}, "None"),
        (3, "config"),
        ([1], "config"),
        ({"model": [1]}, "config"),
        ({"model": {"diff_decoder": 2}}, "config"),
    ],
    ids=str,
)
def test_a_config_of_something_else_is_refused(tmp_path, tiny_tokenizer, config, named):
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, config)
    assert re.search(named, refusal(dar.load_tokenizer, path))


def test_the_repa_head_loads_where_there_is_one(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(image_size=256, repa_layer=1)
    state = released_state(tokenizer)
    assert "diff_decoder.net.repa_out.4.bias" in state
    config = released_config(num_query_groups=8, num_all_queries=32, repa_layer=1)
    path = save_released(tmp_path / "x.pt", {"model": state}, {"model": config})
    loaded = dar.load_tokenizer(path)
    assert_same_weights(loaded, tokenizer.state_dict())
    assert loaded.config.repa_layer == 1


def test_a_bare_state_dict_with_a_repa_head_loads_at_any_depth(tmp_path, golden_tokenizer):
    state = synthetic.synthetic_state_dict(golden_tokenizer)  # three diffusion blocks: v1's layer 8 is not there
    torch.save(state, tmp_path / "x.pt")
    tokenizer = dar.load_tokenizer(tmp_path / "x.pt")
    assert torch.equal(tokenizer.diffusion.repa_head[4].bias, state["diff_decoder.net.repa_out.4.bias"])
    codes = torch.from_numpy(golden_tokenizer["codes"]).long()
    golden = torch.from_numpy(golden_tokenizer["cond"])
    torch.testing.assert_close(tokenizer.condition(codes), golden, rtol=1e-4, atol=1e-4)


# Our own format


def test_our_format_keeps_a_tokenizer_to_the_last_bit(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(group_rule="ceil", num_steps=5, data_scale=0.7, repa_layer=1)
    dar.save_checkpoint(tmp_path / "x.pt", tokenizer)
    loaded = dar.load_tokenizer(tmp_path / "x.pt")
    assert loaded.config == tokenizer.config and not loaded.training
    assert_same_weights(loaded, tokenizer.state_dict())


def test_our_format_keeps_a_llama_its_tokenizer_and_class_names(tmp_path, bundle, tiny_ar, tiny_tokenizer):
    ar = dar.load_ar(bundle)
    assert ar.config == tiny_ar.config and not ar.training
    assert_same_weights(ar, tiny_ar.state_dict())
    assert ar.class_names == ["cat", "dog", "house"]
    assert ar.tokenizer.config == tiny_tokenizer.config and not ar.tokenizer.training
    assert_same_weights(ar.tokenizer, tiny_tokenizer.state_dict())
    with open(bundle, "r+b") as file:  # in place: what is still mapped would change
        file.write(bytes(bundle.stat().st_size))
    assert_same_weights(ar, tiny_ar.state_dict())
    dar.save_checkpoint(tmp_path / "x.pt", tiny_ar)
    alone = dar.load_ar(tmp_path / "x.pt")
    assert alone.tokenizer is None and alone.class_names is None


def test_a_given_tokenizer_wins_over_the_files(tmp_path, bundle, tiny_ar, tiny_tokenizer):
    dar.save_checkpoint(tmp_path / "x.pt", tiny_ar)
    for path in (bundle, tmp_path / "x.pt"):
        assert dar.load_ar(path, tokenizer=tiny_tokenizer).tokenizer is tiny_tokenizer


def test_averaged_weights_win(tmp_path, tiny_ar, make_ar):
    averaged = make_ar(seed=2, width=64, layers=2, vocab_size=16, num_classes=3, num_tokens=8)
    dar.save_checkpoint(tmp_path / "x.pt", tiny_ar, ema=averaged, training={"step": 3, "settings": {"lr": 0.1}})
    assert_same_weights(dar.load_ar(tmp_path / "x.pt"), averaged.state_dict())
    assert dar.read_checkpoint(tmp_path / "x.pt")["training"] == {"step": 3, "settings": {"lr": 0.1}}


def test_our_files_hold_plain_tensors_and_plain_dicts(bundle):
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(bundle)
    data = torch.load(bundle, weights_only=True)
    assert data["config"]["width"] == 64 and type(data["model"]["output.weight"]) is torch.Tensor


def test_dtype_is_chosen_on_saving_and_on_loading(tmp_path, tiny_ar, bundle):
    dar.save_checkpoint(tmp_path / "half.pt", tiny_ar, dtype=torch.bfloat16)
    assert_same_weights(dar.load_ar(tmp_path / "half.pt"), tiny_ar.state_dict(), torch.bfloat16)
    assert dar.load_ar(tmp_path / "half.pt").output.weight.dtype == torch.bfloat16
    assert dar.load_ar(tmp_path / "half.pt", dtype=torch.float32).output.weight.dtype == torch.float32
    ar = dar.load_ar(bundle, dtype=torch.bfloat16)
    assert {p.dtype for p in (*ar.parameters(), *ar.tokenizer.parameters())} == {torch.bfloat16}


SIZES = {"width": 64, "layers": 2, "vocab_size": 16, "num_classes": 3, "num_tokens": 8}


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("format", "dar-99", "dar-99"),
        ("config", None, "config"),
        ("config", SIZES | {"heads": 1}, "heads"),
        ("config", SIZES | {"width": 65}, "65"),
        ("config", SIZES | {"width": 2**30}, ""),  # more than torch can count
        ("config", SIZES | {"layers": 3}, "layers.2"),
        ("class_names", ["cat", "dog"], "class_names"),
        ("class_names", "cat", "class_names"),
        ("class_names", [1, 2, 3], "class_names"),
        ("tokenizer", {}, "tokenizer"),
    ],
    ids=str,
)
def test_nonsense_in_our_format_is_refused_by_name(tmp_path, bundle, field, value, named):
    torch.save(dar.read_checkpoint(bundle) | {field: value}, tmp_path / "x.pt")
    assert named in refusal(dar.load_ar, tmp_path / "x.pt")


# Every tensor is accounted for


@pytest.mark.parametrize("layout", ["ours", "released"])
@pytest.mark.parametrize("kind", ["tokenizer", "ar"])
def test_all_that_is_wrong_with_the_keys_stands_in_one_message(tmp_path, tiny_tokenizer, tiny_ar, layout, kind):
    load, model, missing, shaped = {
        "tokenizer": (dar.load_tokenizer, tiny_tokenizer, "patchify.bias", "decoder_layers.0.gate1"),
        "ar": (dar.load_ar, tiny_ar, "norm.weight", "layers.1.attention.wo.weight"),
    }[kind]
    state = released_state(model) if layout == "released" else dict(model.state_dict())
    del state[missing]
    data = {"model": state | {"discriminator.weight": torch.zeros(2), shaped: torch.zeros(7, 5)}}
    if layout == "ours":
        data |= {"format": "dar-1", "kind": kind, "config": dataclasses.asdict(model.config)}
    torch.save(data, tmp_path / "x.pt")
    message = refusal(load, tmp_path / "x.pt")
    assert all(name in message for name in (missing, shaped, "discriminator.weight", "[7, 5]"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("output.weight", torch.zeros(16, 64, dtype=torch.int64)),
        ("output.weight", torch.zeros(16, 64, dtype=torch.bool)),
        ("output.weight", torch.zeros(16, 64, dtype=torch.complex64)),
        ("output.weight", torch.eye(16, 64).to_sparse()),
        ("output.weight", torch.empty(16, 64, device="meta")),
        ("output.weight", torch.zeros(1).expand(2**40, 64)),  # one number, seen 2**46 times
        ("output.weight", [[0.0] * 64] * 16),
        ("output.weight", "weights"),
        ("output.weight", None),
        ("layers.9999.attention.wo.weight", torch.zeros(64, 64)),
        (3, torch.zeros(2)),
        (None, torch.zeros(2)),
        (("norm", "weight"), torch.zeros(2)),
        ("two\nlines", torch.zeros(2)),
    ],
    ids=lambda value: getattr(value, "dtype", value).__str__()[:20],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of TypedStorage, when it saves a meta tensor
def test_no_tensor_that_does_not_belong_is_skipped_or_made_to_fit(tmp_path, tiny_ar, key, value):
    torch.save(released_state(tiny_ar) | {key: value}, tmp_path / "x.pt")
    start = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = refusal(dar.load_ar, tmp_path / "x.pt")
    assert not isinstance(key, str) or key.removeprefix("module.").split("\n")[0] in message
    assert not warned  # would stand on the terminal beside the one line
    assert time.process_time() - start < 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_naming_file_and_weight(tmp_path, bundle, value):
    data = dar.read_checkpoint(bundle)
    for part in (data["model"]["norm.weight"], data["tokenizer"]["model"]["patchify.bias"]):
        weight = part.clone()
        part[-1] = value
        torch.save(data, tmp_path / "x.pt")
        part.copy_(weight)
        with pytest.raises(FloatingPointError, match="x.pt.*(norm.weight|patchify.bias) is not finite") as error:
            dar.load_ar(tmp_path / "x.pt")
        one_line(error)


# Files that do not belong


def test_a_checkpoint_or_tokenizer_of_another_model_is_refused(tmp_path, released_dir, bundle, make_tokenizer):
    dar.save_checkpoint(tmp_path / "tokenizer.pt", make_tokenizer())
    for path in (tmp_path / "tokenizer.pt", released_dir / "tokenizer.pt"):
        assert "expected a Llama" in refusal(dar.load_ar, path)
    for path in (bundle, released_dir / "ar.pt"):
        assert "expected a tokenizer" in refusal(dar.load_tokenizer, path)
    fits = dict(num_tokens=8, num_groups=4, codebook_size=16)
    for path, fields, named in (
        (bundle, fits | {"codebook_size": 32}, "16 .*32"),
        (bundle, fits | {"num_tokens": 4}, "8 .*4"),
        (released_dir / "ar.pt", fits, "256 .*16"),
    ):
        tokenizer = make_tokenizer(**fields)
        assert re.search(named, refusal(partial(dar.load_ar, tokenizer=tokenizer), path))


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"x": torch.zeros(2)}, [1], torch.zeros(3), None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    for load in (dar.load_ar, dar.load_tokenizer):
        refusal(load, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit, when saving
def test_what_is_no_checkpoint_file_is_refused_without_a_warning(tmp_path, tiny_ar):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    weapon = Weapon(open, str(tmp_path / "ran"), "w")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(weapon))
    torch.save(weapon, tmp_path / "weapon.pt", _use_new_zipfile_serialization=False)
    torch.save(released_state(tiny_ar), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for load in (dar.load_ar, dar.load_tokenizer):
            for name in ("page.pt", "empty.pt", "script.pt", "pickle.pt", "weapon.pt", "old.pt"):
                message = refusal(load, tmp_path / name)
            assert re.search(r"zip.*torch\.save", message)  # what to do with a file of an old torch
            refusal(load, tmp_path / "nothing.pt", FileNotFoundError)
            refusal(load, tmp_path / "folder.pt", (IsADirectoryError, PermissionError))
    assert not warned and not (tmp_path / "ran").exists()


# Files are data: nothing in them runs


class Weapon:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def weapons(marker: Path) -> list[Weapon]:
    """Calls that would make the file `marker`."""
    code = f"open({str(marker)!r}, 'w').close()"
    calls = [(open, str(marker), "w"), (os.mkdir, str(marker)), (exec, code), (eval, code)]
    calls += [(os.system, f"touch '{marker}'"), (subprocess.check_call, ["touch", str(marker)])]
    return [Weapon(*call) for call in calls]


def armed(data: dict, weapon: Weapon):
    """Yields (place, data with the weapon there), for each place at the top and in the dicts and objects below."""
    yield "the whole file", weapon
    yield "a key", data | {weapon: 1}
    for name in (*data, "optimizer", "training", "discriminator"):
        yield name, data | {name: weapon}
        yield f"a list in {name}", data | {name: [weapon]}
        inside = data.get(name)
        if isinstance(inside, dict):
            yield f"a further entry of {name}", data | {name: inside | {"extra": weapon}}
            yield f"the first entry of {name}", data | {name: inside | {next(iter(inside)): weapon}}
        elif isinstance(inside, argparse.Namespace):
            yield f"an attribute of {name}", data | {name: argparse.Namespace(lr=weapon)}


@pytest.mark.parametrize("number", range(6), ids=["open", "mkdir", "exec", "eval", "system", "check_call"])
def test_code_anywhere_in_a_file_is_refused(tmp_path, bundle, tiny_tokenizer, tiny_ar, number):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    weapon = weapons(marker)[number]
    tokenizer, ar = released_state(tiny_tokenizer), released_state(tiny_ar)
    more, config = {"steps": 1, "args": argparse.Namespace(lr=1)}, {"model": released_config()}
    files = [(dar.load_ar, place, data, None) for place, data in armed(dar.read_checkpoint(bundle), weapon)]
    files += [(dar.load_ar, place, data, None) for place, data in armed({"model": ar, "ema": ar} | more, weapon)]
    for place, data in armed({"model": tokenizer, "ema": tokenizer} | more, weapon):
        files.append((dar.load_tokenizer, place, data, config if isinstance(data, dict) else None))
    for place, inside in (("config._data", weapon), ("in it", {"model": released_config(vq_dim=weapon)})):
        files.append((dar.load_tokenizer, place, {"model": tokenizer}, inside))
    for load, place, data, inside in files:
        save_released(path, data, inside)
        assert "could run code" in refusal(load, path), place
        assert not marker.exists(), f"code in {place} ran"
    torch.save(weapon, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the weapon of this test is none"


@pytest.mark.parametrize("opcodes", ["GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "STACK_GLOBAL in two steps"])
def test_hand_made_pickles_are_refused(tmp_path, bundle, opcodes):
    """Other ways to write a call than the one that Python's own pickler takes."""
    marker = tmp_path / "ran"
    command = f"touch '{marker}'".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    made = {
        "GLOBAL": b"\x80\x02cposix\nsystem\n" + text + b"\x85R.",
        "INST": b"(" + text + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + text + b"o.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "STACK_GLOBAL in two steps": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x93\x8c"
        b"\x08__call__\x86R" + text + b"\x85R.",
    }[opcodes]
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, made if entry.endswith("data.pkl") else old.read(entry))
    for load in (dar.load_ar, dar.load_tokenizer):
        with pytest.raises(ValueError) as error:
            load(tmp_path / "x.pt")
        assert "weights_only" not in one_line(error), "torch's advice to load the file unsafely"
    assert not marker.exists()
    pickle.loads(made)
    assert marker.exists(), "the weapon of this test is none"


def test_other_classes_than_the_two_known_ones_are_refused_by_name(tmp_path, tiny_ar):
    for instance, name in ((io.StringIO(), "StringIO"), (random.Random(), "Random"), (Path("x"), "Path")):
        torch.save({"model": released_state(tiny_ar), "args": instance}, tmp_path / "x.pt")
        assert name in refusal(dar.load_ar, tmp_path / "x.pt")


def test_nothing_is_imported_for_a_file(tmp_path, monkeypatch, tiny_tokenizer):
    (tmp_path / "config_util.py").write_text("raise AssertionError('this was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, {"model": released_config()})
    modules = set(sys.modules)
    dar.load_tokenizer(path)
    assert "config_util" not in sys.modules
    assert not {name for name in set(sys.modules) - modules if not name.startswith("torch")}


def test_the_stand_ins_are_inert_and_known_while_loading_alone(tmp_path, tiny_ar, released_dir):
    before = set(torch.serialization.get_safe_globals())
    data = dar.read_checkpoint(released_dir / "tokenizer.pt")
    assert not isinstance(data["args"], argparse.Namespace) and type(data["args"]) is type(data["config"])
    assert set(torch.serialization.get_safe_globals()) == before
    torch.save(Weapon(print, "x"), tmp_path / "x.pt")
    with pytest.raises(ValueError):
        dar.load_ar(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(released_dir / "tokenizer.pt", weights_only=True)


# Damage


def corruptions(good: bytes, count: int):
    """Yields (what was done, bytes): truncations, and damage to the zip directory, the pickle and the local headers."""
    rng = random.Random(1)
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        entry = next(info for info in file.infolist() if info.filename.endswith("data.pkl"))
        directory, headers = file.start_dir, [info.header_offset for info in file.infolist()]
    extra = int.from_bytes(good[entry.header_offset + 28 : entry.header_offset + 30], "little")
    start = entry.header_offset + 30 + extra + len(entry.filename)
    stop, size = start + entry.file_size, len(good)
    cuts = [0, 1, 3, 4, 30, start, start + 100, directory, directory + 1, size - 22, size - 1]
    for cut in cuts + [rng.randrange(size) for _ in range(count // 4 - len(cuts))]:
        yield f"cut at {cut}", good[:cut]
    regions = [("pickle", start, stop), ("directory", directory, size), ("end of directory", size - 22, size)]
    regions = regions * (count // 5) + [("header", header, header + 30) for header in headers[: count // 10]]
    for region, low, high in regions:
        bad = bytearray(good)
        for _ in range(1 if region == "header" else rng.choice((1, 1, 1, 2, 20))):
            bad[rng.randrange(low, high)] ^= rng.randrange(1, 256)
        yield f"{region} of {low} to {high}, flipped", bytes(bad)
    for low in [rng.randrange(start, stop - 40) for _ in range(count // 20)]:
        yield f"pickle, 40 bytes from {low} zeroed", good[:low] + bytes(40) + good[low + 40 :]
        yield f"pickle, 40 bytes from {low} gone", good[:low] + good[low + 40 :]


@pytest.mark.parametrize("which", ["bundle", "released tokenizer", "released llama"])
def test_damaged_files_load_the_same_or_end_in_one_line(tmp_path, tiny_ar, tiny_tokenizer, capfd, which):
    path = tmp_path / "x.pt"
    if which == "bundle":
        save_bundle(path, tiny_ar, tiny_tokenizer)
    elif which == "released tokenizer":
        save_released(path, {"ema": released_state(tiny_tokenizer), "steps": 1}, {"model": released_config()})
    else:
        torch.save({"model": released_state(tiny_ar), "args": argparse.Namespace(lr=1)}, path)
    load, original = (dar.load_tokenizer, tiny_tokenizer) if "tokenizer" in which else (dar.load_ar, tiny_ar)
    refused = tried = 0
    for what, bad in corruptions(path.read_bytes(), 140):
        path.unlink()  # what is still mapped of the last one stays as it was
        path.write_bytes(bad)
        start = time.process_time()
        try:
            with warnings.catch_warnings(record=True) as warned:
                loaded = load(path)
            assert not what.startswith("cut"), f"{what}: loaded"
            if not what.startswith("header"):  # these may point into tensor data, where nothing can be noticed
                assert_same_weights(loaded, original.state_dict())
                assert which != "bundle" or loaded.tokenizer.config == tiny_tokenizer.config
        except (ValueError, FloatingPointError) as error:
            refused += 1
            message = str(error)
            assert str(path) in message and message.isprintable() and len(message) < 2000, f"{what}: {message!r}"
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
        tried += 1
        assert time.process_time() - start < 5, f"{what}: took too long"
        assert not warned, f"{what}: {warned[0].message}"
    assert tried >= 130 and refused > tried / 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["a number", "zipped again", "compressed", "100 bytes before it"])
def test_a_well_formed_file_that_was_changed_loads_the_same_or_is_refused(tmp_path, bundle, tiny_ar, change):
    path, good, number = tmp_path / "x.pt", bundle.read_bytes(), b"G" + struct.pack(">d", 0.5)  # the data scale
    if change in ("zipped again", "compressed"):
        compression = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(path, "w", compression) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
    elif change == "a number":  # nothing but the checksum can tell
        assert good.count(number) == 1
        path.write_bytes(good.replace(number, b"G" + struct.pack(">d", 0.625)))
    else:  # zip files may begin anywhere; mapped tensors may not be off by that much
        path.write_bytes(bytes(100) + good)
    if change in ("a number", "compressed"):
        refusal(dar.load_ar, path)
        return
    try:
        ar = dar.load_ar(path)
    except ValueError:
        assert change != "zipped again"
        return
    assert_same_weights(ar, tiny_ar.state_dict())


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, bundle):
    data, good = dar.read_checkpoint(bundle), bundle.read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    torch.save(data | {"args": weapons(tmp_path / "ran")[0]}, tmp_path / "code.pt")
    torch.save(data | {"model": data["model"] | {"two\nlines": torch.zeros(1)}}, tmp_path / "keys.pt")
    torch.save(data | {"model": data["model"] | {"norm.weight": torch.full((64,), torch.nan)}}, tmp_path / "nan.pt")
    for name, code in (("cut", 2), ("code", 2), ("keys", 2), ("nothing", 2), ("nan", 3)):
        command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--ckpt", tmp_path / f"{name}.pt"]
        done = subprocess.run([*command, "--out", tmp_path / "out.png"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code and done.stdout == "", done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and f"{name}.pt" in done.stderr
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "ran").exists()


# Memory


MEASURE = """
import sys, threading
import torch, dar

def memory(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))

with torch.device("meta"):
    dar.ARTransformer(dar.ARConfig(64, 1))  # what torch imports for that is no part of the file
before = memory("RssAnon"), memory("RssFile")
peak, stop = [0, 0], threading.Event()

def watch():
    while not stop.wait(0.002):
        peak[:] = max(peak[0], memory("RssAnon")), max(peak[1], memory("RssFile"))

thread = threading.Thread(target=watch)
thread.start()
model = dar.load_ar(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
stop.set()
thread.join()
peak[:] = max(peak[0], memory("RssAnon")), max(peak[1], memory("RssFile"))
print(sum(p.nbytes for p in model.parameters()), peak[0] - before[0], peak[1] - before[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    with torch.device("meta"):
        model = dar.ARTransformer(dar.ARConfig(width=512, layers=2, vocab_size=10000, num_classes=10))
    state = {name: torch.full(p.shape, 0.5) for name, p in model.state_dict().items()}
    other = {name: torch.zeros(p.shape) for name, p in state.items()}
    optimizer = {"state": {0: {"exp_avg": other, "exp_avg_sq": dict(other)}}, "param_groups": []}
    torch.save(
        {"model": {k: v.clone() for k, v in other.items()}, "ema": state, "optimizer": optimizer}, tmp_path / "x.pt"
    )
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, tmp_path / "x.pt", dtype]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        kept, anonymous, mapped = (int(word) for word in done.stdout.split())
        assert kept > 25e6
        assert anonymous < 1.3 * kept, f"{dtype}: {anonymous / kept:.2f} times the weights kept"
        in_file = sum(p.nbytes for p in state.values())
        assert mapped < 1.3 * in_file, (
            f"{dtype}: more of the file was read than the weights: {mapped / in_file:.2f} times"
        )


def test_8_bit_floats_load(tmp_path, tiny_ar):
    torch.save({"model": {k: v.to(torch.float8_e4m3fn) for k, v in tiny_ar.state_dict().items()}}, tmp_path / "x.pt")
    assert dar.load_ar(tmp_path / "x.pt", dtype=torch.float32, num_tokens=8).output.weight.isfinite().all()


# Writing


def test_a_file_appears_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    dar.write_atomically(path, lambda file: file.write(path.read_bytes() + b" and new"))
    assert path.read_bytes() == b"old and new"
    assert os.listdir(tmp_path) == ["x.bin"]
    with pytest.raises(OSError, match="nowhere") as error:
        dar.write_atomically(tmp_path / "nowhere" / "x.bin", lambda file: file.write(b"x"))
    one_line(error)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space"), RuntimeError("disk\nfull"), OSError(), KeyboardInterrupt()]
)
def test_a_failed_write_keeps_the_old_file_and_says_so(tmp_path, failure):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise failure

    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OSError) as error:
        dar.write_atomically(path, write)
    assert isinstance(failure, KeyboardInterrupt) or "x.bin" in one_line(error)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, bundle, tiny_tokenizer):
    def save(data, file):
        file.write(b"PK\x03\x04")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    before = bundle.read_bytes()
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="bundle.pt"):
        dar.save_checkpoint(bundle, tiny_tokenizer)
    assert bundle.read_bytes() == before
    assert os.listdir(tmp_path) == ["bundle.pt"]
