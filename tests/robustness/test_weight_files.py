"""dar.py and files of weights that are damaged, hostile or odd: they load, or one line names the
file and what is wrong. Nothing in them runs."""

import argparse
import io
import os
import pickle
import random
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import dar


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


@pytest.fixture(scope="module")
def bundle(make_ar, make_tokenizer):
    """A small Llama that carries a small tokenizer."""
    ar = make_ar(width=64, layers=1, vocab_size=16, num_classes=3, num_tokens=8)
    fields = dict(encoder_layers=1, decoder_layers=1, diffusion_layers=1, decoder_width=64)
    ar.attach_tokenizer(make_tokenizer(num_tokens=8, num_groups=4, codebook_size=16, **fields))
    ar.class_names = ["ant", "bee", "cat"]
    return ar


@pytest.fixture
def data(path, bundle) -> dict:
    """What is in the bundle's file, which lies at path."""
    dar.save_checkpoint(path, bundle)
    return torch.load(path)


def refusal(load, path, error=ValueError) -> str:
    """The one line with which load(path) fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they would stand on the terminal beside the line
        with pytest.raises(error) as raised:
            load(path)
    message = str(raised.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    return message


# Other files


OTHER_FILES = {
    "empty": lambda path: path.touch(),
    "web page": lambda path: path.write_text("<!DOCTYPE html>\n<html>404: Not Found</html>\n"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}})),
    "zip file": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "text"),
    "torch 1.5": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "TorchScript": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
    "list": lambda path: torch.save([1], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "nothing": lambda path: torch.save({}, path),
    "no weights": lambda path: torch.save({"model": 3}, path),
    "another network": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("load", [dar.load_ar, dar.load_tokenizer])
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # when the test saves TorchScript
def test_other_files_are_refused(path, kind, load):
    OTHER_FILES[kind](path)
    refusal(load, path)


def test_a_missing_file_is_named(path):
    refusal(dar.load_ar, path, FileNotFoundError)


def test_a_folder_is_named(tmp_path):
    refusal(dar.load_ar, tmp_path, OSError)


def test_a_model_of_another_kind_is_refused(path, data, released_dir, small_tokenizer):
    assert "tokenizer" in refusal(dar.load_ar, released_dir / "tokenizer.pt")
    assert "Tokenizer" in refusal(dar.load_tokenizer, released_dir / "ar.pt")
    dar.save_checkpoint(path, small_tokenizer)
    assert "kind 'tokenizer', expected 'ar'" in refusal(dar.load_ar, path)


# Other contents


SIZES = {"width": 64, "layers": 1, "vocab_size": 16, "num_classes": 3, "num_tokens": 8}


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("format", "dar-99", "dar-99"),
        ("format", ["dar-1"], "dar-1"),
        ("kind", 3, "kind 3"),
        ("config", None, ""),
        ("config", [1], ""),
        ("config", SIZES | {"heads": 1}, "heads"),
        ("config", SIZES | {"width": 65}, "65"),
        ("config", SIZES | {"width": "64"}, ""),
        ("config", SIZES | {"width": 2**30}, ""),
        ("config", SIZES | {"layers": 2}, "layers.1"),
        ("class_names", ["cat", "dog"], "class_names"),
        ("class_names", "cat", "class_names"),
        ("tokenizer", {}, ""),
        ("model", {}, "output.weight"),
        ("model", [], ""),
    ],
    ids=str,
)
def test_nonsense_is_refused(path, data, field, value, named):
    torch.save(data | {field: value}, path)
    assert named in refusal(dar.load_ar, path)


def test_a_tokenizer_that_is_none_is_refused(path, data):
    torch.save(data | {"tokenizer": 3}, path)
    refusal(dar.load_tokenizer, path)


def test_all_wrong_names_and_shapes_stand_in_one_line(path, data):
    weights = data["model"]
    del weights["norm.weight"]
    weights["discriminator.weight"] = torch.zeros(2)
    weights["layers.0.attention.wo.weight"] = torch.zeros(7, 5)
    torch.save(data, path)
    message = refusal(dar.load_ar, path)
    for wrong in ("norm.weight", "discriminator.weight", "layers.0.attention.wo.weight", "[7, 5]"):
        assert wrong in message


ODD_TENSORS = {
    "integers": ("output.weight", torch.zeros(16, 64, dtype=torch.int64)),
    "sparse": ("output.weight", torch.eye(16, 64).to_sparse()),
    "without numbers": ("output.weight", torch.empty(16, 64, device="meta")),
    "another shape": ("output.weight", torch.zeros(1).expand(2**40, 64)),
    "numbers in lists": ("output.weight", [[0.0] * 64] * 16),
    "nothing": ("output.weight", None),
    "one layer more": ("layers.9999.attention.wo.weight", torch.zeros(64, 64)),
    "a number as its name": (3, torch.zeros(2)),
    "no name": (None, torch.zeros(2)),
    "two lines as its name": ("two\nlines", torch.zeros(2)),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, when it saves a meta tensor
def test_odd_tensors_are_refused(path, data, kind):
    name, value = ODD_TENSORS[kind]
    data["model"][name] = value
    torch.save(data, path)
    refusal(dar.load_ar, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_failed_training_is_named(path, data, value, part):
    weights = data["model"] if part == "model" else data["tokenizer"]["model"]
    name = list(weights)[-1]
    weights[name].flatten()[-1] = value
    torch.save(data, path)
    assert f"{name} is not finite" in refusal(dar.load_ar, path, FloatingPointError)


# Files are data: nothing in them runs


class Weapon:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def weapon(kind: str, mark: Path) -> Weapon:
    """A call that would make the file mark."""
    calls = {
        "open": (open, str(mark), "w"),
        "exec": (exec, f"open({str(mark)!r}, 'w')"),
        "system": (os.system, f"touch '{mark}'"),
        "check_call": (subprocess.check_call, ["touch", str(mark)]),
    }
    return Weapon(*calls[kind])


@pytest.mark.parametrize("kind", ["open", "exec", "system", "check_call"])
def test_code_is_refused(path, tmp_path, kind):
    torch.save(weapon(kind, tmp_path / "ran"), path)
    assert "could run" in refusal(dar.load_ar, path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so it is a weapon


class Config:
    """As the authors' class config_util.Config, which nobody has who loads their file."""

    def __init__(self, data):
        self._data = data


Config.__module__ = "config_util"


PLACES = {
    "the whole file": lambda data, weapon: weapon,
    "a key": lambda data, weapon: data | {weapon: 1},
    "the config": lambda data, weapon: data | {"config": weapon},
    "the weights": lambda data, weapon: data | {"model": weapon},
    "a weight": lambda data, weapon: data | {"model": data["model"] | {"norm.weight": weapon}},
    "one name more": lambda data, weapon: data | {"ema": data["model"] | {"extra": weapon}},
    "a list": lambda data, weapon: data | {"class_names": ["ant", "bee", weapon]},
    "the tokenizer": lambda data, weapon: data | {"tokenizer": weapon},
    "what nobody reads": lambda data, weapon: data | {"optimizer": [weapon]},
    "their args": lambda data, weapon: data | {"args": argparse.Namespace(lr=weapon)},
    "their config": lambda data, weapon: data | {"config": Config({"model": weapon})},
}


@pytest.mark.parametrize("place", PLACES)
def test_code_is_refused_wherever_it_stands(path, data, tmp_path, monkeypatch, place):
    with monkeypatch.context() as while_saving:
        module = types.SimpleNamespace(Config=Config)
        while_saving.setitem(sys.modules, "config_util", module)
        torch.save(PLACES[place](data, weapon("system", tmp_path / "ran")), path)
    assert "could run" in refusal(dar.load_ar, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("instance", [io.StringIO(), random.Random(), Path("x")], ids=repr)
def test_other_classes_are_refused_by_name(path, data, instance):
    torch.save(data | {"args": instance}, path)
    assert type(instance).__name__ in refusal(dar.load_ar, path)


def test_nothing_is_imported_for_a_file(released_dir, tmp_path, monkeypatch):
    (tmp_path / "config_util.py").write_text("raise AssertionError('this was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    dar.load_tokenizer(released_dir / "tokenizer.pt")
    assert "config_util" not in sys.modules


# Damage


def damage(good: bytes, seed: int) -> bytes:
    """Cuts the file, or changes some bytes of its pickle or of its directory."""
    dice = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        entry = next(info for info in file.infolist() if info.filename.endswith("data.pkl"))
        start, stop = entry.header_offset, entry.header_offset + entry.file_size
        directory = file.start_dir
    if seed % 4 == 0:
        return good[: dice.randrange(len(good))]
    low, high = [(start, stop), (directory, len(good)), (len(good) - 22, len(good))][seed % 4 - 1]
    bad = bytearray(good)
    for _ in range(dice.choice((1, 1, 2, 20))):
        bad[dice.randrange(low, high)] ^= dice.randrange(1, 256)
    return bytes(bad)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_loads_or_is_refused_in_a_line(path, data, capfd, seed):
    bad = damage(path.read_bytes(), seed)
    path.unlink()  # what is mapped of it stays as it was
    path.write_bytes(bad)
    try:
        dar.load_ar(path)
    except (ValueError, FloatingPointError) as error:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
    else:
        assert seed % 4 > 0, "a file that was cut has loaded"
    assert capfd.readouterr() == ("", "")


def test_a_compressed_file_is_refused(path, data):
    """Its tensors cannot be read where they lie."""
    good = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    refusal(dar.load_ar, path)
