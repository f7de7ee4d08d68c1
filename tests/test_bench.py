"""experiments/bench.py: operations are counted rightly, and no figure passes its limit."""

import re

import pytest
from command_lines import ROOT, run

import dar
from experiments import bench


@pytest.mark.slow
def test_no_figure_passes_its_limit():
    words = "--models tiny --batch 1 --dtype float32 --tokens 8 --seconds 0.01 --device cpu"
    table = run("experiments/bench.py", *words.split(), PYTHONPATH=ROOT).stdout
    pattern = r"^(.+?) +1 +float32 +eager +([\d.]+) ms +([\d.]+) ms"
    rows = re.findall(pattern, table, re.MULTILINE)
    assert [name for name, _, _ in rows] == [
        "tiny encode",
        "tiny decode",
        "tiny generate, guided",
        "tiny tokenizer training step",
        "tiny Llama training step",
    ]
    for name, measured, limit in rows:
        assert 0 < float(limit) < float(measured), name


# A Linear from a to b features costs 2ab operations a token, attention of n queries to m keys 4nmC.


def block_operations(width: int, n: int) -> int:
    linears = 24 * width**2 * n  # queries, keys, values, projection: 4 C²; an MLP of 4 C: 8 C²
    return linears + 4 * n * n * width


def test_encoding_is_a_transformer_and_a_search_in_the_codebook():
    c = dar.TOKENIZER_PRESETS["v1"]
    patchify = 2 * 256 * (3 * 16**2) * 768
    quantize = 2 * 256 * 8 * (768 + 16384)
    expected = 8 * block_operations(768, 512) + patchify + quantize
    assert bench.encode_operations(c) == pytest.approx(expected, rel=0.002)
    expected = 8 * block_operations(768, 256)
    assert bench.causal_operations(c) == pytest.approx(expected, rel=0.002)


def test_a_step_of_the_flow_is_mostly_its_blocks():
    # For each of 1024 patches: self-attention and MLP 12 C², query and output of cross-attention
    # 2 C², modulation 6 C². For each of 32 tokens of the group: 4 C².
    patches = 40 * 768**2 * 1024
    tokens = 8 * 768**2 * 32
    attention = 4 * 1024 * (1024 + 32) * 768
    patch_in_and_out = 4 * 1024 * (3 * 8**2) * 768
    expected = 12 * (patches + tokens + attention) + patch_in_and_out
    operations = bench.flow_operations(dar.TOKENIZER_PRESETS["v1"])
    assert operations == pytest.approx(expected, rel=0.01)


def test_a_llama_is_its_layers_and_the_output():
    linears = 2 * 256 * (4 * 1024**2 + 3 * 1024 * 2816)
    attention = 4 * 256 * 256 * 1024
    output = 2 * 256 * 1024 * 16384
    expected = 24 * (linears + attention) + output
    operations = bench.llama_operations(dar.AR_PRESETS["L"], 256)
    assert operations == pytest.approx(expected, rel=0.002)
