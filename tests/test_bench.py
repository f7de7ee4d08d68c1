"""experiments/bench.py: every figure beside a limit that it does not pass, from operations that are counted rightly."""

import json

import pytest
from command_lines import run

import dar
from experiments import bench


@pytest.mark.slow
def test_bench_sets_each_figure_beside_a_limit_that_it_does_not_pass(tmp_path):
    words = "--rows encode decode generate stream train --batch 1 --tokens 8 --seconds 0.01 --dtype float32"
    run("experiments/bench.py", *words.split(), *"--device cpu --json".split(), tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    parts = "encode", "decode", "guided", "no guidance", "tokenizer training", "Llama training", "preview", "picture"
    assert len(rows) == len(parts)
    for row, part in zip(rows, parts):
        assert part in row["row"] and row["share"] == pytest.approx(row["limit_seconds"] / row["seconds"])
        assert 0 < row["share"] < 1


@pytest.mark.slow
def test_bench_says_what_it_cannot_measure_before_it_starts(tmp_path):
    assert "belong together" in run("experiments/bench.py", *"--rows stream --models B --device cpu".split()).stdout
    done = run("experiments/bench.py", "--json", tmp_path / "nowhere" / "x.json", code=2)
    assert "nowhere" in done.stderr and not done.stdout


def test_the_operations_are_those_of_the_matrix_products():
    """A Linear from a to b features costs 2ab a token, attention of n queries to m keys 4nmC."""

    def block(width, n, m):  # q, k, v, proj (4 C²), an MLP of 4 C (8 C²), attention
        return 24 * width**2 * n + 4 * n * m * width

    c, llama = dar.TOKENIZER_PRESETS["v1"], dar.AR_PRESETS["L"]
    encode = c.encoder_layers * block(768, 512, 512) + 2 * 256 * 3 * 16**2 * 768 + 2 * 256 * 8 * (768 + 16384)
    assert bench.encode_operations(c) == pytest.approx(encode, rel=0.002)
    assert bench.causal_operations(c) == pytest.approx(8 * block(768, 256, 256), rel=0.002)
    # self-attention and MLP (12 C²), query and output of the cross-attention (2 C²), modulation (6 C²); a token: 4 C²
    step = 12 * (40 * 768**2 * 1024 + 4 * 1024 * (1024 + 32) * 768 + 8 * 768**2 * 32) + 4 * 1024 * 3 * 64 * 768
    assert bench.denoise_operations(c) == pytest.approx(step, rel=0.01)
    layer = 2 * 256 * (4 * 1024**2 + 3 * 1024 * 2816) + 4 * 256 * 256 * 1024
    assert bench.ar_operations(llama, 256) == pytest.approx(24 * layer + 2 * 256 * 1024 * 16384, rel=0.002)
