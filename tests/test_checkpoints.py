"""Chapter 9: the authors' released layout and our own format, and every way in which a file can be wrong."""

import argparse
import builtins
import dataclasses
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
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


def test_a_full_training_file_gives_its_ema_weights(tmp_path, tiny_tokenizer):
    state = released_state(tiny_tokenizer) | {"quantize.codebook_used": torch.zeros(65536)}
    data = {
        "model": plus_one(state),
        "ema": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4}]},
        "discriminator": {"weight": torch.zeros(3)},
        "optimizer_disc": {},
        "steps": 210000,
        "args": argparse.Namespace(lr=2e-4, config="tokenizer_v1.yaml"),
    }
    path = save_released(tmp_path / "x.pt", data, {"model": released_config()})
    tokenizer = dar.load_tokenizer(path)
    assert_same_weights(tokenizer, tiny_tokenizer.state_dict())
    assert tokenizer.config == tiny_tokenizer.config


def test_without_ema_weights_the_plain_ones_load(tmp_path, tiny_tokenizer, tiny_ar):
    path = save_released(tmp_path / "t.pt", {"model": released_state(tiny_tokenizer)}, {"model": released_config()})
    assert_same_weights(dar.load_tokenizer(path), tiny_tokenizer.state_dict())
    torch.save({"model": released_state(tiny_ar), "ema": None}, tmp_path / "a.pt")
    assert_same_weights(dar.load_ar(tmp_path / "a.pt"), tiny_ar.state_dict())


def test_with_ema_weights_alone_these_load(tmp_path, tiny_ar):
    torch.save({"ema": released_state(tiny_ar)}, tmp_path / "x.pt")
    assert_same_weights(dar.load_ar(tmp_path / "x.pt"), tiny_ar.state_dict())


def test_an_ar_file_prefers_ema_weights_and_ignores_what_args_say(tmp_path, tiny_ar):
    state = released_state(tiny_ar)
    args = argparse.Namespace(gpt_model="GPT-XXL", num_classes=1000, vocab_size=16384)
    torch.save({"model": plus_one(state), "ema": state, "steps": 1, "args": args}, tmp_path / "x.pt")
    ar = dar.load_ar(tmp_path / "x.pt", num_tokens=8)
    assert_same_weights(ar, tiny_ar.state_dict())
    assert ar.config == tiny_ar.config


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
def test_the_config_is_read_in_each_form(tmp_path, tiny_tokenizer, form):
    data, config = {"model": released_state(tiny_tokenizer)}, released_config(num_denoising_steps=3, data_std=1.0)
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


def test_unknown_config_keys_are_ignored(tmp_path, tiny_tokenizer):
    config = {"model": released_config(mlp_head=False, share_time_encoding=False, dropout=0.3, name="x", nested={})}
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, config)
    assert dar.load_tokenizer(path).config == tiny_tokenizer.config


@pytest.mark.parametrize("name, value", [("vq_enable", False), ("mlp_head", True), ("share_time_encoding", True)])
def test_a_config_of_another_architecture_is_refused(tmp_path, tiny_tokenizer, name, value):
    config = {"model": released_config(**{name: value})}
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, config)
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        dar.load_tokenizer(path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_all_queries": 9}, "9"),  # not divisible by K = 4
        ({"num_all_queries": 260}, "260"),  # the tables have 256 rows
        ({"num_query_groups": "four"}, "four"),
        ({"time_shift": -1}, "-1"),
        ({"data_std": None}, "None"),
    ],
)
def test_config_values_that_cannot_be_are_refused(tmp_path, tiny_tokenizer, changes, named):
    data = {"model": released_state(tiny_tokenizer)}
    path = save_released(tmp_path / "x.pt", data, {"model": released_config(**changes)})
    with pytest.raises(ValueError, match=named) as error:
        dar.load_tokenizer(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("config", [3, [1], {"model": [1]}, {"model": {"diff_decoder": 2}}])
def test_a_config_that_is_no_dict_is_refused(tmp_path, tiny_tokenizer, config):
    path = save_released(tmp_path / "x.pt", {"model": released_state(tiny_tokenizer)}, config)
    with pytest.raises(ValueError, match="config") as error:
        dar.load_tokenizer(path)
    one_line(error)


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


def test_our_format_keeps_a_llama_its_tokenizer_and_class_names(bundle, tiny_ar, tiny_tokenizer):
    ar = dar.load_ar(bundle)
    assert ar.config == tiny_ar.config and not ar.training
    assert_same_weights(ar, tiny_ar.state_dict())
    assert ar.class_names == ["cat", "dog", "house"]
    assert ar.tokenizer.config == tiny_tokenizer.config and not ar.tokenizer.training
    assert_same_weights(ar.tokenizer, tiny_tokenizer.state_dict())


def test_a_llama_without_tokenizer_and_names_has_none(tmp_path, tiny_ar, tiny_tokenizer):
    dar.save_checkpoint(tmp_path / "x.pt", tiny_ar)
    ar = dar.load_ar(tmp_path / "x.pt")
    assert ar.tokenizer is None and ar.class_names is None
    assert dar.load_ar(tmp_path / "x.pt", tokenizer=tiny_tokenizer).tokenizer is tiny_tokenizer


def test_a_given_tokenizer_wins_over_the_files(bundle, tiny_tokenizer):
    assert dar.load_ar(bundle, tokenizer=tiny_tokenizer).tokenizer is tiny_tokenizer


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


def test_a_loaded_model_does_not_depend_on_its_file(bundle, tiny_ar):
    ar = dar.load_ar(bundle)
    with open(bundle, "r+b") as file:  # in place: what is still mapped would change
        file.write(bytes(bundle.stat().st_size))
    assert_same_weights(ar, tiny_ar.state_dict())


def test_a_format_of_the_future_is_refused(tmp_path, bundle):
    torch.save(dar.read_checkpoint(bundle) | {"format": "dar-99"}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="dar-99"):
        dar.load_ar(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "field, value",
    [
        ("config", None),
        ("config", {"width": 64, "layers": 2, "vocab_size": 16, "num_classes": 3, "num_tokens": 8, "heads": 1}),
        ("config", {"width": 65, "layers": 2, "vocab_size": 16, "num_classes": 3, "num_tokens": 8}),
        ("config", {"width": 64, "layers": 3, "vocab_size": 16, "num_classes": 3, "num_tokens": 8}),
        ("class_names", ["cat", "dog"]),
        ("class_names", "cat"),
        ("class_names", [1, 2, 3]),
        ("tokenizer", 3),
        ("tokenizer", {}),
    ],
)
def test_nonsense_in_our_format_is_refused_by_name(tmp_path, bundle, field, value):
    torch.save(dar.read_checkpoint(bundle) | {field: value}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"{field}|heads|65|layers.2") as error:
        dar.load_ar(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in one_line(error)


# Every tensor is accounted for


@pytest.mark.parametrize("layout", ["ours", "released"])
def test_all_that_is_wrong_with_the_keys_stands_in_one_message(tmp_path, tiny_tokenizer, tiny_ar, layout):
    for load, model in ((dar.load_tokenizer, tiny_tokenizer), (dar.load_ar, tiny_ar)):
        tokenizer = model is tiny_tokenizer
        missing, shaped, typed = (
            ("patchify.bias", "decoder_layers.0.gate1", "encoder_layers.0.norm1.weight")
            if tokenizer
            else ("norm.weight", "layers.1.attention.wo.weight", "layers.0.ffn_norm.weight")
        )
        state = released_state(model) if layout == "released" else dict(model.state_dict())
        del state[missing]
        state["discriminator.weight"] = torch.zeros(2)
        state[shaped] = torch.zeros(7, 5)
        data = {"model": state}
        if layout == "ours":
            kind = "tokenizer" if tokenizer else "ar"
            data |= {"format": "dar-1", "kind": kind, "config": dataclasses.asdict(model.config)}
        torch.save(data, tmp_path / "x.pt")
        with pytest.raises(ValueError) as error:
            load(tmp_path / "x.pt")
        message = one_line(error)
        for name in (missing, shaped, "discriminator.weight", "[7, 5]", str(tmp_path / "x.pt")):
            assert name in message


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(16, 64, dtype=torch.int64),
        torch.zeros(16, 64, dtype=torch.bool),
        torch.zeros(16, 64, dtype=torch.complex64),
        torch.eye(16, 64).to_sparse(),
        torch.empty(16, 64, device="meta"),
        [[0.0] * 64] * 16,
        "weights",
        None,
    ],
    ids=["int64", "bool", "complex", "sparse", "meta", "list", "str", "None"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of TypedStorage, when it saves a meta tensor
def test_what_is_no_dense_tensor_of_floats_is_refused(tmp_path, tiny_ar, value):
    torch.save(released_state(tiny_ar) | {"output.weight": value}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="output.weight") as error:
        dar.load_ar(tmp_path / "x.pt")
    one_line(error)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, tiny_ar):
    huge = torch.zeros(1).expand(2**40, 64)  # one number, seen 2**46 times
    state = released_state(tiny_ar) | {"output.weight": huge, "tok_embeddings.weight": huge}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        dar.load_ar(tmp_path / "x.pt")
    one_line(error)


@pytest.mark.parametrize("key", [3, None, ("norm", "weight"), "two\nlines"], ids=str)
def test_no_key_is_skipped_whatever_it_is(tmp_path, tiny_ar, key):
    torch.save({"model": released_state(tiny_ar) | {key: torch.zeros(2)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        dar.load_ar(tmp_path / "x.pt")
    one_line(error)


def test_two_keys_of_one_name_are_refused(tmp_path, tiny_ar):
    state = released_state(tiny_ar)
    torch.save({"model": state | {"module.norm.weight": torch.zeros(64)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="norm.weight"):
        dar.load_ar(tmp_path / "x.pt")


def test_a_layer_number_out_of_all_reason_is_refused_at_once(tmp_path, tiny_ar):
    torch.save(released_state(tiny_ar) | {"layers.9999.attention.wo.weight": torch.zeros(64, 64)}, tmp_path / "x.pt")
    start = time.process_time()
    with pytest.raises(ValueError, match="layers.9999"):
        dar.load_ar(tmp_path / "x.pt")
    assert time.process_time() - start < 2


# Files that do not belong


def test_the_other_models_checkpoint_is_refused(tmp_path, released_dir, bundle, tiny_tokenizer):
    dar.save_checkpoint(tmp_path / "tokenizer.pt", tiny_tokenizer)
    for path in (tmp_path / "tokenizer.pt", released_dir / "tokenizer.pt"):
        with pytest.raises(ValueError, match="expected a Llama"):
            dar.load_ar(path)
    for path in (bundle, released_dir / "ar.pt"):
        with pytest.raises(ValueError, match="expected a tokenizer"):
            dar.load_tokenizer(path)


@pytest.mark.parametrize("fields, named", [({"codebook_size": 32}, "16 .*32"), ({"num_tokens": 4}, "8 .*4")])
def test_a_tokenizer_of_another_model_is_refused_with_both_numbers(bundle, make_tokenizer, fields, named):
    tokenizer = make_tokenizer(**{"num_tokens": 8, "num_groups": 4, "codebook_size": 16} | fields)
    with pytest.raises(ValueError, match=named) as error:
        dar.load_ar(bundle, tokenizer=tokenizer)
    one_line(error)


def test_a_released_model_with_another_vocabulary_is_refused(released_dir, small_tokenizer):
    with pytest.raises(ValueError, match="256 .*64"):
        dar.load_ar(released_dir / "ar.pt", tokenizer=small_tokenizer)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"x": torch.zeros(2)}, [1], torch.zeros(3), None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    for load in (dar.load_ar, dar.load_tokenizer):
        with pytest.raises(ValueError) as error:
            load(tmp_path / "x.pt")
        assert str(tmp_path / "x.pt") in one_line(error)


def test_no_file_no_folder_no_text(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    for load in (dar.load_ar, dar.load_tokenizer):
        with pytest.raises(FileNotFoundError, match="nothing.pt") as error:
            load(tmp_path / "nothing.pt")
        one_line(error)
        for name in ("page.pt", "empty.pt", "folder.pt"):
            with pytest.raises((ValueError, IsADirectoryError, PermissionError), match=name) as error:
                load(tmp_path / name)
            one_line(error)


def test_a_file_of_an_old_torch_is_refused_with_a_hint(tmp_path, tiny_ar):
    torch.save(released_state(tiny_ar), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"zip.*torch\.save") as error:
        dar.load_ar(tmp_path / "x.pt")
    one_line(error)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit, when saving
def test_refusals_warn_of_nothing(tmp_path, tiny_ar):
    """A warning would stand on the terminal beside the one line that says what is wrong."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save(released_state(tiny_ar) | {"output.weight": torch.eye(16, 64).to_sparse()}, tmp_path / "sparse.pt")
    for name in ("script.pt", "sparse.pt"):
        with warnings.catch_warnings(record=True) as warned, pytest.raises(ValueError) as error:
            warnings.simplefilter("always")
            dar.load_ar(tmp_path / name)
        assert name in one_line(error)
        assert not warned


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
    return [
        Weapon(open, str(marker), "w"),
        Weapon(os.system, f"touch '{marker}'"),
        Weapon(os.mkdir, str(marker)),
        Weapon(builtins.exec, code),
        Weapon(builtins.eval, code),
        Weapon(subprocess.check_call, ["touch", str(marker)]),
    ]


def released_places(weapon, state: dict) -> dict[str, tuple]:
    """(data, config) of a released file with the weapon in each place where one could be."""
    clean = {"model": state, "ema": state, "steps": 1, "args": argparse.Namespace(lr=1)}
    config = {"model": released_config()}
    return {
        "top level": (weapon, None),
        "a key of the top level": (clean | {weapon: 1}, config),
        "another entry": (clean | {"extra": weapon}, config),
        "steps": (clean | {"steps": weapon}, config),
        "args": (clean | {"args": weapon}, config),
        "in args": (clean | {"args": argparse.Namespace(lr=weapon)}, config),
        "config": (clean | {"config": weapon}, None),
        "config._data": (clean, weapon),
        "in config._data": (clean, {"model": released_config(vq_dim=weapon)}),
        "model": (clean | {"model": weapon}, config),
        "in the model": (clean | {"model": state | {"extra": weapon}}, config),
        "a tensor's place": (clean | {"ema": state | {"patchify.bias": weapon}}, config),
        "optimizer": (clean | {"optimizer": {"state": {0: weapon}}}, config),
        "discriminator": (clean | {"discriminator": [weapon]}, config),
    }


def assert_refused_and_nothing_ran(load, path: Path, marker: Path, place: str):
    with pytest.raises(ValueError) as error:
        load(path)
    assert "could run code" in one_line(error), place
    assert str(path) in str(error.value)
    assert not marker.exists(), f"code in {place} ran"


def test_the_weapons_of_these_tests_are_real(tmp_path):
    for i, weapon in enumerate(weapons(tmp_path / "ran")):
        torch.save(weapon, tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / "ran").exists(), i
        (tmp_path / "ran").rename(tmp_path / f"ran{i}")


def test_code_anywhere_in_a_released_tokenizer_is_refused(tmp_path, tiny_tokenizer):
    state, marker = released_state(tiny_tokenizer), tmp_path / "ran"
    for weapon in weapons(marker):
        for place, (data, config) in released_places(weapon, state).items():
            path = save_released(tmp_path / "x.pt", data, config)
            assert_refused_and_nothing_ran(dar.load_tokenizer, path, marker, place)


def test_code_anywhere_in_a_released_llama_is_refused(tmp_path, tiny_ar):
    state, marker = released_state(tiny_ar), tmp_path / "ran"
    for weapon in weapons(marker):
        for place, (data, _) in released_places(weapon, state).items():
            if "config" not in place:
                path = save_released(tmp_path / "x.pt", data)
                assert_refused_and_nothing_ran(dar.load_ar, path, marker, place)


def test_code_anywhere_in_our_own_format_is_refused(tmp_path, bundle):
    data, marker = dar.read_checkpoint(bundle), tmp_path / "ran"
    for weapon in weapons(marker):
        for field in (*data, "ema", "training"):
            torch.save(data | {field: weapon}, tmp_path / "x.pt")
            assert_refused_and_nothing_ran(dar.load_ar, tmp_path / "x.pt", marker, field)
        for field in ("config", "model", "tokenizer"):
            torch.save(data | {field: data[field] | {"extra": weapon}}, tmp_path / "x.pt")
            assert_refused_and_nothing_ran(dar.load_ar, tmp_path / "x.pt", marker, f"in {field}")


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


def test_a_pickle_outside_a_zip_file_is_refused(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Weapon(open, str(marker), "w")))
    torch.save(Weapon(open, str(marker), "w"), tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ValueError) as error:
            dar.load_ar(tmp_path / name)
        one_line(error)
    assert not marker.exists()


def test_other_classes_than_the_two_known_ones_are_refused_by_name(tmp_path, tiny_ar):
    for instance, name in ((io.StringIO(), "StringIO"), (random.Random(), "Random"), (Path("x"), "Path")):
        torch.save({"model": released_state(tiny_ar), "args": instance}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=name) as error:
            dar.load_ar(tmp_path / "x.pt")
        one_line(error)


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


def corruptions(good: bytes, seed: int, count: int):
    """Yields (what was done, bytes): truncations, and damage to the zip directory, the pickle and the local headers."""
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        entry = next(info for info in file.infolist() if info.filename.endswith("data.pkl"))
        directory, headers = file.start_dir, [info.header_offset for info in file.infolist()]
    start = (
        entry.header_offset + 30 + int.from_bytes(good[entry.header_offset + 28 : entry.header_offset + 30], "little")
    )
    start += len(entry.filename)
    regions = {
        "pickle": (start, start + entry.file_size),
        "directory": (directory, len(good)),
        "end of directory": (len(good) - 22, len(good)),
    }
    cuts = [0, 1, 3, 4, 30, start, start + 100, directory, directory + 1, len(good) - 22, len(good) - 1]
    cuts += [rng.randrange(len(good)) for _ in range(count // 4 - len(cuts))]
    for cut in cuts:
        yield f"cut at {cut}", good[:cut]
    for region, (low, high) in regions.items():
        for _ in range(count // 5):
            bad = bytearray(good)
            places = [rng.randrange(low, high) for _ in range(rng.choice((1, 1, 1, 2, 20)))]
            for place in places:
                bad[place] ^= rng.randrange(1, 256)
            yield f"{region}, flipped at {places}", bytes(bad)
    for header in rng.sample(headers, min(count // 10, len(headers))):
        bad = bytearray(good)
        bad[header + rng.randrange(30)] ^= rng.randrange(1, 256)
        yield f"header flipped at {header}", bytes(bad)
    for _ in range(count // 20):
        low = rng.randrange(start, start + entry.file_size - 40)
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
    for what, bad in corruptions(path.read_bytes(), 1, 140):
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


def test_a_number_changed_in_the_pickle_is_noticed(tmp_path, bundle):
    """Nothing but the checksum can tell: the file is as well-formed as before."""
    good, number = bundle.read_bytes(), b"G" + struct.pack(">d", 0.5)  # the tokenizer's data scale
    assert good.count(number) == 1
    (tmp_path / "x.pt").write_bytes(good.replace(number, b"G" + struct.pack(">d", 0.625)))
    with pytest.raises(ValueError) as error:
        dar.load_ar(tmp_path / "x.pt")
    one_line(error)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_checkpoint_that_was_zipped_again_loads_the_same_or_is_refused(tmp_path, bundle, tiny_ar, compression):
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(tmp_path / "x.pt", "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    if compression == zipfile.ZIP_STORED:
        assert_same_weights(dar.load_ar(tmp_path / "x.pt"), tiny_ar.state_dict())
    else:  # a mapped tensor would be its compressed bytes
        with pytest.raises(ValueError) as error:
            dar.load_ar(tmp_path / "x.pt")
        one_line(error)


def test_a_checkpoint_after_other_bytes_loads_or_is_refused(tmp_path, bundle):
    """Zip files may begin anywhere; mapped tensors may not be off by that much."""
    (tmp_path / "x.pt").write_bytes(bytes(100) + bundle.read_bytes())
    expected = dar.load_ar(bundle)
    try:
        ar = dar.load_ar(tmp_path / "x.pt")
    except ValueError:
        return
    assert_same_weights(ar, expected.state_dict())


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, tiny_ar, tiny_tokenizer):
    good = save_bundle(tmp_path / "good.pt", tiny_ar, tiny_tokenizer).read_bytes()
    state = released_state(tiny_ar)
    data = dar.read_checkpoint(tmp_path / "good.pt")
    wrong = {name: tmp_path / f"{name}.pt" for name in ("cut", "page", "directory", "pickle", "old")}
    wrong["cut"].write_bytes(good[: len(good) // 2])
    wrong["page"].write_text("<html>\n<body>Not found</body>\n</html>\n")
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        directory = file.start_dir
    wrong["directory"].write_bytes(good[: directory + 8] + b"\xff" * 40 + good[directory + 48 :])
    wrong["pickle"].write_bytes(good[:200] + b"\xff" * 40 + good[240:])
    torch.save(state, wrong["old"], _use_new_zipfile_serialization=False)
    wrong["folder"] = tmp_path
    wrong["nothing"] = tmp_path / "nothing.pt"
    torch.save(data | {"args": weapons(tmp_path / "ran")[0]}, tmp_path / "code.pt")
    wrong["code"] = tmp_path / "code.pt"
    model = data["model"] | {"output.weight": torch.zeros(64, 16), "two\nlines": torch.zeros(1)}
    torch.save(data | {"model": model}, tmp_path / "shapes.pt")
    wrong["shapes"] = tmp_path / "shapes.pt"
    dar.save_checkpoint(tmp_path / "tokenizer.pt", tiny_tokenizer)
    wrong["tokenizer"] = tmp_path / "tokenizer.pt"

    def run(path):
        command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--ckpt", path, "--out", tmp_path / "out.png"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(wrong, pool.map(run, wrong.values())):
            assert done.returncode == 2, f"{name}: {done}"
            assert done.stdout == "" and len(done.stderr.splitlines()) == 1, f"{name}: {done}"
            assert done.stderr.startswith("error: ") and wrong[name].name in done.stderr, f"{name}: {done}"
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


# Writing


def test_a_file_appears_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, and ")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"longer")

    dar.write_atomically(path, write)
    assert path.read_bytes() == b"new, and longer"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("disk\nfull")])
def test_a_failed_write_keeps_the_old_file_and_says_so(tmp_path, failure):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise failure

    with pytest.raises(OSError, match="x.bin") as error:
        dar.write_atomically(path, write)
    one_line(error)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, TypeError])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, failure):
    def write(file):
        file.write(b"half of the n")
        raise failure

    with pytest.raises(failure):
        dar.write_atomically(tmp_path / "x.bin", write)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere") as error:
        dar.write_atomically(tmp_path / "nowhere" / "x.bin", lambda file: file.write(b"x"))
    one_line(error)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, bundle, tiny_ar, tiny_tokenizer):
    def save(data, file):
        file.write(b"PK\x03\x04")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    before = bundle.read_bytes()
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="bundle.pt"):
        dar.save_checkpoint(bundle, tiny_tokenizer)
    assert bundle.read_bytes() == before
    assert os.listdir(tmp_path) == ["bundle.pt"]
