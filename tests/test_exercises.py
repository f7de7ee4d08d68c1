"""experiments/exercises.py: an exercise's functions go, only its own tests turn red, and grading survives students."""

import ast
import csv
import json
import re
import sys
from pathlib import Path

import pytest
from command_lines import ROOT, run

from experiments import exercises
from experiments.exercises import EXERCISES, blank, functions_of, put, take, write_copy


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_only_the_bodies_of_the_listed_functions_go(exercise):
    before = (ROOT / exercise.file).read_text()
    after = blank(before, exercise.functions, exercise.number)

    def bodies(source: str) -> dict[str, tuple]:
        """{function or Class.method: its docstring, its arguments, the code that is left}."""
        found = {}
        for name, part in functions_of(source).items():
            doc = ast.get_docstring(part)
            found[name] = doc, ast.unparse(part.args), "\n".join(map(ast.unparse, part.body[doc is not None :]))
        return found

    old, new = bodies(before), bodies(after)
    assert old.keys() == new.keys() and set(exercise.functions) <= old.keys()
    for name in old:
        assert old[name][:2] == new[name][:2]  # docstring and arguments stay
        if name in exercise.functions:
            assert new[name][2] == f"raise NotImplementedError('exercise {exercise.number}: {name}')"
        else:
            assert old[name] == new[name]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_a_handout_names_tests_that_exist_and_the_functions_of_its_task(exercise):
    for test in exercise.points:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test
    for function in exercise.functions:
        short = function.split(".")[-1]
        assert re.search(rf"^\* `({function}|{short})`", exercise.text, re.MULTILINE), f"nothing says what {short} does"
    assert f"\n{sum(exercise.points.values())} points" in exercise.text


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_a_right_solution_put_into_the_blank_is_the_projects_code(exercise):
    before = (ROOT / exercise.file).read_text()
    taken = take(ROOT / exercise.file, exercise.functions)
    assert list(taken) == exercise.functions
    assert put(blank(before, exercise.functions, exercise.number), taken) == before


def test_a_copy_holds_the_blank_and_the_handout(tmp_path):
    done = run("experiments/exercises.py", "3", "--out", "course", cwd=tmp_path)
    assert "EXERCISE.md" in done.stdout
    assert "exercise 3" in (tmp_path / "course" / "dar.py").read_text()
    text = (tmp_path / "course" / "EXERCISE.md").read_text()
    assert "DiffusionBlock.forward" in text and "--grade ." in text and "python -m pytest tests/" in text
    assert not list(Path(tmp_path / "course").glob(".git"))


MISTAKES = {
    "3 --out .": "exists",
    "9": "1 to 8",
    "1 2 --grade course": "one number",
    "1 --csv x.csv": "--grade",
    "1 --grade a b --json x.json": "one FOLDER",
    "1 --grade course --csv none/x.csv": "none/x.csv",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_refused_before_anything_is_graded(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["exercises.py", *words.split()])
    with pytest.raises(ValueError, match=MISTAKES[words]):
        exercises.main()


# Students of exercise 2: what they write as VectorQuantizer.nearest_code, in a copy of the right solution

RIGHT = """\
    @torch.no_grad()
    def nearest_code(self, f: Tensor) -> Tensor:
        with torch.autocast(f.device.type, enabled=False):
            flat, codebook = f.float().reshape(-1, f.shape[-1]), self.codebook()
            return torch.cat([(part @ codebook.T).argmax(-1) for part in flat.split(2048)]).view(f.shape[:-1])
"""
HALF_RIGHT = {
    "the farthest": (".argmax(", ".argmin("),
    "in bfloat16": ("enabled=False", "torch.bfloat16"),
    "rows of any length": ("self.codebook()", "self.embedding.weight"),
    "one code for all": (".view(f.shape[:-1])", ".view(f.shape[:-1]) * 0"),
    "one number too many": (".view(f.shape[:-1])", ".view(f.shape[:-1]) + 1"),
}
HOSTILE = {
    "a syntax error": ("def nearest_code(self, f: Tensor)", "def nearest_code(self, f: Tensor"),
    "an exit": ("with torch", "os._exit(0)\n        with torch"),
    "a polite exit": ("with torch", "sys.exit(0)\n        with torch"),
    "an exit when it is read": ("f: Tensor)", "f: Tensor = os._exit(0))"),
    "pytest's end": ("with torch", "import pytest; pytest.exit('passed', 0)\n        with torch"),
    "a skip": ("with torch", "import pytest; pytest.skip()\n        with torch"),
    "closed files": ("with torch", "os.closerange(0, 99)\n        with torch"),
    "a flood": ("with torch", "os.write(1, b'x' * 10**8)\n        with torch"),
    "a file of a terabyte": ("with torch", "open('x', 'wb').write(bytes(10**8))\n        with torch"),
    "all memory": ("with torch", "bytearray(2**45)\n        with torch"),
    "a child left behind": ("with torch", "os.fork() or __import__('time').sleep(10**6)\n        with torch"),
    "forged results": (
        "with torch",
        '[os.write(i, b\'["", "finished", 1]\') for i in range(3, 99)]\n        with torch',
    ),
    "extra functions": (
        "    @torch.no_grad()\n",
        "    def codebook(self):\n        os._exit(0)\n\n    @torch.no_grad()\n",
    ),
}


def student(folder: Path, change: tuple[str, str] | None = None) -> Path:
    """A folder with dar.py, in which nearest_code is RIGHT, but for one change."""
    source = (ROOT / "dar.py").read_text()
    own = RIGHT if change is None else RIGHT.replace(*change, 1)
    assert change is None or own != RIGHT
    node = functions_of(source)["VectorQuantizer.nearest_code"]
    lines = source.split("\n")
    lines[node.lineno - 2 : node.end_lineno] = own.rstrip("\n").split("\n")
    folder.mkdir()
    (folder / "dar.py").write_text("\n".join(lines))
    return folder


def graded(folders, cwd) -> dict[str, dict]:
    """{folder: its row of the table}, of one run of the command."""
    run("experiments/exercises.py", "2", "--grade", *folders, "--csv", "table.csv", cwd=cwd)
    with open(cwd / "table.csv", newline="") as file:
        return {Path(row["folder"]).name: row for row in csv.DictReader(file)}


def test_a_right_solution_gets_all_points_and_gradescopes_file(tmp_path):
    folder = student(tmp_path / "right")
    done = run("experiments/exercises.py", "2", "--grade", folder, "--json", "results.json", cwd=tmp_path)
    assert "30 of 30 points" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 30 == sum(test["score"] for test in results["tests"])
    assert {"name", "score", "max_score", "output"} <= set(results["tests"][0])


@pytest.mark.slow
def test_half_right_solutions_get_some_points_and_a_blank_one_none(tmp_path):
    folders = [student(tmp_path / name, change) for name, change in HALF_RIGHT.items()]
    write_copy(tmp_path / "blank", EXERCISES[1])
    rows = graded([*folders, tmp_path / "blank"], tmp_path)
    assert int(rows["blank"]["points"]) == 0
    assert all(0 < int(rows[name]["points"]) < 30 for name in HALF_RIGHT), rows


@pytest.mark.slow
def test_hostile_solutions_cost_their_authors_points_and_nobody_else(tmp_path):
    folders = [student(tmp_path / name, change) for name, change in HOSTILE.items()]
    odd = {name: tmp_path / name for name in ("nothing", "a folder for a file", "no text", "a bomb", "a tampered test")}
    for folder in odd.values():
        folder.mkdir()
    (odd["a folder for a file"] / "dar.py").mkdir()
    (odd["no text"] / "dar.py").write_bytes(b"\xff\xfe\x00def")
    (odd["a bomb"] / "dar.py").write_text("(" * 10**5)
    write_copy(odd["a tampered test"] / "x", EXERCISES[1])
    for path in (odd["a tampered test"] / "x").iterdir():
        path.rename(odd["a tampered test"] / path.name)
    (odd["a tampered test"] / "tests" / "test_quantizer.py").write_text("def test_all(): pass\n")
    rows = graded([*folders, *odd.values(), student(tmp_path / "right")], tmp_path)
    assert len(rows) == len(HOSTILE) + len(odd) + 1
    harmless = "right", "extra functions", "a child left behind"  # and otherwise right
    assert all((row["points"] == "30") == (name in harmless) for name, row in rows.items()), rows
    assert all(rows[name]["points"] == "0" for name in ("a syntax error", "an exit when it is read", *odd)), rows


@pytest.mark.slow
def test_an_endless_loop_costs_the_test_that_it_runs_in(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "TEST_SECONDS", 8)
    loop = ("with torch", "while f.numel() > 5000:\n            pass\n        with torch")
    result = exercises.grade(EXERCISES[1], student(tmp_path / "loop", loop))
    assert 0 < result.points < 30
    assert [test.split("::")[1] for test, why in result.failed.items() if "over 8 s" in why]


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)
def test_a_blank_exercise_fails_its_own_grading_tests_and_no_others(exercise):
    counts = exercises.check(exercise)
    assert counts.pop(exercise.number) == (len(exercise.points), 0)
    assert all(red == 0 for red, _ in counts.values()), counts
