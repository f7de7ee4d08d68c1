"""experiments/explore.py: one page that needs nothing else, whatever the model and its classes are called."""

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


@pytest.fixture
def page(tmp_path, monkeypatch, make_tokenizer, make_ar):
    """Function: explore.main with these arguments, for a small model with three classes -> the page's text."""
    ar = make_ar(num_classes=3, num_tokens=8)
    ar.class_names = ["cat", "</script><script>alert(1)</script>", "猫 & dog"]
    ar.attach_tokenizer(make_tokenizer(num_tokens=8, num_groups=4, image_size=16))
    dar.save_checkpoint(tmp_path / "ar.pt", ar)

    def draw(*words):
        monkeypatch.setattr(sys, "argv", ["explore.py", "--ckpt", str(tmp_path / "ar.pt"), "--device", "cpu", *words])
        monkeypatch.chdir(tmp_path)
        explore.main()
        return (tmp_path / "explore.html").read_text(encoding="utf-8")

    return draw


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,"))))


def test_the_page_holds_all_that_it_shows(page):
    text = page("--seeds", "5", "9")
    data = data_of(text)
    assert data["names"] == ["cat", "</script><script>alert(1)</script>", "猫 & dog"]
    assert text.count("<script") == 2 and "http" not in text.replace("</html>", "")
    assert data["groups"] == 4 and data["seeds"] == [5, 9] and data["source"] == "cat, seed 5"
    assert [len(codes) for codes in data["codes"]] == [8] * 6
    assert [picture(url).size for url in data["sprites"]] == [(4 * 16, 2 * 16)] * 6  # flows above previews
    assert picture(data["layouts"]).size == (3 * 16, 5 * 16)


def test_its_tokens_are_those_of_the_model(page, tmp_path):
    codes = data_of(page("--classes", "2", "0", "--seeds", "7", "--cfg", "3"))["codes"]
    ar = dar.prepare_for_sampling(dar.load_ar(tmp_path / "ar.pt"))
    assert codes == [ar.generate(torch.tensor([label]), cfg=3.0, seeds=[7])[0].tolist() for label in (2, 0)]


@pytest.mark.parametrize(
    "words, wrong",
    [("--classes 3", "--classes"), ("--out nowhere/x.html", "nowhere"), ("--out .", "--out"), ("--cfg nan", "nan")],
)
def test_mistakes_are_named(page, words, wrong):
    with pytest.raises(ValueError, match=wrong):
        page(*words.split())


def test_a_page_that_would_be_too_large_says_what_to_leave_out(page, monkeypatch):
    monkeypatch.setattr(explore, "sprite", lambda images, columns: "x" * 10**6)
    with pytest.raises(ValueError, match="--classes or --seeds"):
        page()
