"""What a reader runs first: the notebook from top to bottom, and README's Python example."""

import base64
import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from command_lines import ROOT, environment
from PIL import Image

NOTEBOOK = ROOT / "experiments" / "dar.ipynb"


def read_notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_stores_no_outputs():
    for cell in read_notebook().cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read_notebook()
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    sizes = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                data = base64.b64decode(output["data"]["image/png"])
                sizes.append(Image.open(io.BytesIO(data)).size)
    columns = [(8, 1), (9, 3), (6, 4), (10, 1)]
    assert sizes == [(98 * x + 2, 98 * y + 2) for x, y in columns]


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    pixels = np.random.default_rng(0).integers(256, size=(80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=ROOT),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "horses.png").size == (8 * 98 + 2, 98 + 2)
    assert Image.open(tmp_path / "photo.png").size == (10 * 98 + 2, 98 + 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "horses.png", "photo.jpg", "photo.png"]
