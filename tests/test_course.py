"""The course: handouts that fit the code, copies in which the exercise is blank, and grading that
gives a student the same points as the teacher."""

import ast
import csv
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from course import grader
from course.__main__ import grade_all, main
from course.exercises import PROJECT, all_functions, blank, read_exercises, solved

EXERCISES = read_exercises()
each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: e.title)


def run_course(*words, cwd=PROJECT, code=0, **environment) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "course", *map(str, words)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# ------------------------------------------------------------------------------
# Handouts


@each_exercise
def test_a_handout_gives_points_to_every_test_of_its_exercise(exercise):
    module = importlib.import_module(f"course.tests.exercise_{exercise.number}")
    tests = [name for name in vars(module) if name.startswith("test_")]
    assert sorted(exercise.points) == sorted(tests)
    assert f"{exercise.full_points} points by tests" in exercise.text


@each_exercise
def test_the_projects_code_passes_every_test(exercise):
    module = importlib.import_module(f"course.tests.exercise_{exercise.number}")
    for test in exercise.points:
        torch.manual_seed(0)
        getattr(module, test)()


@each_exercise
def test_the_blank_differs_in_the_functions_of_the_exercise_alone(exercise):
    source = (PROJECT / exercise.file).read_text()
    blanked = blank(source, exercise)
    before = all_functions(ast.parse(source))
    after = all_functions(ast.parse(blanked))
    for name in exercise.docstrings:
        assert ast.unparse(after[name].args) == ast.unparse(before[name].args)
        assert ast.unparse(after[name].body[-1]) == f"raise NotImplementedError('{name}')"
        assert len(after[name].body) == 2
    assert grader.changed_parts(source, blanked, exercise) == []


@each_exercise
def test_signatures_in_a_handout_are_the_codes(exercise):
    """Names of arguments; a function that only holds another one has none there."""
    block = re.search(r"```python\n(.*?)```", exercise.text, re.DOTALL)[1]
    theirs = all_functions(ast.parse(block))
    ours = all_functions(ast.parse((PROJECT / exercise.file).read_text()))
    for name in exercise.docstrings:
        arguments = [argument.arg for argument in theirs[name].args.args]
        assert arguments == [argument.arg for argument in ours[name].args.args], name


# ------------------------------------------------------------------------------
# Copies and points


@pytest.mark.slow
def test_a_students_own_command_gives_the_teachers_points(tmp_path):
    copy = tmp_path / "copy"
    run_course(2, "--out", copy)
    assert "--grade ." in (copy / "EXERCISE.md").read_text()
    assert not (copy / "course" / "TEACHERS.md").exists()
    source = (copy / "dar.py").read_text()
    # One of the two functions, with a helper above its class, an import and a type hint; and a
    # change of a test, which does not count.
    source = source.replace("import dataclasses", "import dataclasses\nfrom typing import Optional")
    source = source.replace("class VectorQuantizer", HELPER + "\n\nclass VectorQuantizer")
    source = source.replace('raise NotImplementedError("VectorQuantizer.nearest_code")', CALL)
    source = source.replace("def nearest_code(self, f: Tensor)", "def nearest_code(self, f: Hint)")
    (copy / "dar.py").write_text(source)
    (copy / "course" / "tests" / "exercise_2.py").write_text("")
    own = run_course(2, "--grade", ".", cwd=copy)
    teachers = run_course(2, "--grade", copy)
    assert ".: 5 of 26 points" in own.stdout
    assert f"{copy}: 5 of 26 points" in teachers.stdout
    assert own.stdout.splitlines()[:-1] == teachers.stdout.splitlines()[:-1]
    assert "NotImplementedError: VectorQuantizer.forward\n        dar.py, line" in own.stdout


HELPER = """\
Hint = Optional[Tensor]


def directions(x):
    return F.normalize(x.float(), dim=-1)
"""
CALL = """\
with torch.autocast(f.device.type, enabled=False):
            return (directions(f) @ directions(self.embedding.weight).T).argmax(-1)"""


@pytest.mark.slow
@each_exercise
def test_the_solution_gets_all_points_and_blank_functions_none(exercise):
    assert "grading works here" in run_course(exercise.number, "--check").stdout


@pytest.mark.slow
def test_gradescopes_folder_works_as_it_is_documented(tmp_path):
    """The zip is unpacked to source/, the submission lies in submission/; results/ gets a file."""
    run_course(2, "--gradescope", tmp_path / "autograder" / "source")
    submission = tmp_path / "autograder" / "submission"
    submission.mkdir()
    (submission / "dar.py").write_bytes(solved()["dar.py"])
    (tmp_path / "autograder" / "results").mkdir()
    python = tmp_path / "autograder" / "venv" / "bin"
    python.mkdir(parents=True)
    (python / "python3").symlink_to(sys.executable)
    script = tmp_path / "autograder" / "source" / "run_autograder"
    environment = os.environ | {"AUTOGRADER_ROOT": str(tmp_path / "autograder")}
    environment["PYTHONPATH"] = os.pathsep.join(
        path for path in sys.path if "site-packages" in path
    )
    subprocess.run([script], env=environment, check=True)
    results = json.loads((tmp_path / "autograder" / "results" / "results.json").read_text())
    assert results["score"] == 26 == sum(test["score"] for test in results["tests"])
    assert set(results["tests"][0]) == {"name", "score", "max_score", "output"}
    assert os.access(script.with_name("setup.sh"), os.X_OK)


def test_a_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    graded = []

    def grade(exercise, path):
        graded.append(path.name)
        return grader.Grade(dict.fromkeys(exercise.points, ""), "", 26, 1.0)

    monkeypatch.setattr("course.__main__.check_itself", lambda exercise: None)
    monkeypatch.setattr("course.__main__.grade", grade)
    ann, bob = tmp_path / "ann", tmp_path / "bob"
    for folder in (ann, bob):
        folder.mkdir()
        (folder / "dar.py").write_text("x = 1\n")
    table = tmp_path / "table.csv"
    grade_all(EXERCISES[2], [ann], table, None)
    (ann / "more.txt").write_text("is not the file that counts")
    grade_all(EXERCISES[2], [ann, bob], table, None)
    assert graded == ["ann", "bob"]
    (ann / "dar.py").write_text("x = 2\n")  # handed in anew
    grade_all(EXERCISES[2], [ann, bob], table, None)
    assert graded == ["ann", "bob", "ann"]
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["submission"]).name for row in rows] == ["ann", "bob"]


# ------------------------------------------------------------------------------
# What is handed in, and mistakes


def write_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"# {name}")
    return path


def test_a_submission_is_a_file_a_folder_or_a_zip(tmp_path):
    (tmp_path / "a" / "copy" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "copy" / "dar.py").write_text("# a")
    (tmp_path / "a" / "copy" / "deep" / "dar.py").write_text("# deep")
    assert grader.read_submission(tmp_path / "a", "dar.py") == b"# a"
    assert grader.read_submission(tmp_path / "a" / "copy", "dar.py") == b"# a"
    assert (
        grader.read_submission(tmp_path / "a" / "copy" / "deep" / "dar.py", "dar.py") == b"# deep"
    )
    path = write_zip(tmp_path / "b.zip", "copy/dar.py", "__MACOSX/copy/._dar.py", "copy/x/dar.py")
    assert grader.read_submission(path, "dar.py") == b"# copy/dar.py"
    for name in ("./dar.py", "copy\\dar.py"):
        path = write_zip(tmp_path / "odd.zip", "dar.py/", name)
        assert grader.read_submission(path, "dar.py") == f"# {name}".encode()
    (tmp_path / "c").mkdir()
    write_zip(tmp_path / "c" / "my work.ZIP", "dar.py")
    assert grader.read_submission(tmp_path / "c", "dar.py") == b"# dar.py"


@pytest.mark.parametrize("kind", ["nothing", "two", "a link", "a folder", "too large", "no zip"])
def test_a_submission_that_cannot_be_read_is_refused(kind, tmp_path):
    path = tmp_path / "student"
    path.mkdir()
    if kind == "two":
        for name in ("x", "y"):
            (path / name).mkdir()
            (path / name / "dar.py").write_text("# which?")
    elif kind == "a link":
        (path / "dar.py").symlink_to(PROJECT / "dar.py")
    elif kind == "a folder":
        (path / "dar.py").mkdir()
    elif kind == "too large":
        (path / "dar.py").write_bytes(bytes(2**20 + 1))
    elif kind == "no zip":
        (path / "work.zip").write_text("no zip")
    with pytest.raises(ValueError):
        grader.read_submission(path, "dar.py")


@pytest.mark.parametrize(
    "words, named",
    [
        ("3 --out {tmp}", "exists"),
        ("3 --out {project}/course/copy", "lies in course"),
        ("3 --out {project}/tests/../experiments/x/copy", "lies in experiments"),
        ("--grade x", "number"),
        ("1 --csv x.csv", "--grade"),
        ("1 --grade a b --json x.json", "one submission"),
        ("1 --grade a --csv none/x.csv", "none/x.csv"),
        ("1 --grade a --csv {project}/dar.py", "no table"),
    ],
)
def test_mistakes_are_refused_before_anything_is_graded(words, named, tmp_path, monkeypatch):
    words = words.format(tmp=tmp_path, project=PROJECT)
    monkeypatch.setattr(sys, "argv", ["course", *words.split()])
    monkeypatch.setattr("course.__main__.adopt_orphans", lambda: None)
    monkeypatch.setattr("course.__main__.signal.signal", lambda *_: None)
    with pytest.raises(ValueError, match=named):
        main()
