"""experiments/explore.py: one page that needs nothing else, whatever its classes are called."""

import base64
import io
import json
import re
import sys

import pytest
import torch
from PIL import Image

import dar
from experiments import explore

NAMES = ["cat", "</script><script>alert(1)</script>", "猫 & dog"]


@pytest.fixture
def draw_page(tmp_path, monkeypatch, make_tokenizer, make_ar):
    """Function: the command line's words -> the page's text, for a small model with NAMES."""
    ar = make_ar(num_classes=3, num_tokens=8)
    ar.class_names = NAMES
    ar.attach_tokenizer(make_tokenizer(num_tokens=8, num_groups=4, image_size=16))
    dar.save_checkpoint(tmp_path / "ar.pt", ar)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dar, "attend", dar.attend)  # which the script replaces

    def draw(*words) -> str:
        arguments = ["explore.py", "--ckpt", "ar.pt", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", arguments)
        explore.main()
        return (tmp_path / "explore.html").read_text(encoding="utf-8")

    return draw


def read_data(page: str) -> dict:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1]
    return json.loads(text)


def picture_size(url: str) -> tuple[int, int]:
    data = base64.b64decode(url.removeprefix("data:image/webp;base64,"))
    return Image.open(io.BytesIO(data)).size


def test_the_page_holds_all_that_it_shows(draw_page):
    page = draw_page("--seeds", "5", "9")
    data = read_data(page)
    assert data["names"] == NAMES
    assert page.count("<script") == 2  # no name has become one
    assert "http" not in page
    assert data["groups"] == 4
    assert data["seeds"] == [5, 9]
    assert data["source"] == "cat, seed 5"
    assert [len(codes) for codes in data["codes"]] == [8] * 6
    sizes = [picture_size(sheet) for sheet in data["sheets"]]
    assert sizes == [(4 * 16, 2 * 16)] * 6  # a column for each group; the flow above the previews
    assert picture_size(data["layouts"]) == (3 * 16, 5 * 16)


def test_its_tokens_are_those_of_the_model(draw_page, tmp_path):
    page = draw_page("--classes", "猫 & dog", "0", "--seeds", "7", "--cfg", "3")
    ar = dar.load_ar(tmp_path / "ar.pt")
    expected = [
        ar.generate(torch.tensor([label]), cfg=3.0, seeds=7)[0].tolist() for label in (2, 0)
    ]
    assert read_data(page)["codes"] == expected


def test_an_unknown_class_is_named(draw_page):
    with pytest.raises(ValueError, match="no class dog"):
        draw_page("--classes", "dog")


def test_many_pictures_are_shown_smaller():
    assert explore.choose_size(256, num_images=100) == 128
    assert explore.choose_size(256, num_images=600) == 64
    assert explore.choose_size(16, num_images=9000) == 16


def test_too_many_seeds_are_refused_before_anything_is_drawn(draw_page, monkeypatch):
    monkeypatch.setattr(dar, "stream", None)
    seeds = [str(seed) for seed in range(1000)]
    with pytest.raises(ValueError, match="fewer --classes or --seeds"):
        draw_page("--seeds", *seeds)
