"""experiments/exercises.py: the functions of an exercise go, and only the tests that grade it turn red."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import ROOT, run

from experiments.exercises import EXERCISES, blank, write_copy

NUMBERS = range(1, len(EXERCISES) + 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_only_the_bodies_of_the_listed_functions_go(number):
    exercise = EXERCISES[number - 1]
    before = (ROOT / exercise.file).read_text()
    after = blank(before, exercise.functions, number)

    def bodies(source: str) -> dict[str, str]:
        """{function or Class.method: its code without docstring}, and the docstrings beside them."""
        found = {}
        for node in ast.parse(source).body:
            for part in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(part, ast.FunctionDef):
                    name = part.name if part is node else f"{node.name}.{part.name}"
                    doc = ast.get_docstring(part)
                    found[name] = doc, ast.unparse(part.args), "\n".join(map(ast.unparse, part.body[doc is not None :]))
        return found

    old, new = bodies(before), bodies(after)
    assert old.keys() == new.keys() and set(exercise.functions) <= old.keys()
    for name in old:
        assert old[name][:2] == new[name][:2]  # docstring and arguments stay
        if name in exercise.functions:
            assert new[name][2] == f"raise NotImplementedError('exercise {number}: {name}')"
        else:
            assert old[name] == new[name]
    assert (ROOT / exercise.tests).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_copy_fails_its_own_tests_and_passes_the_others(tmp_path, number):
    write_copy(tmp_path / "course", number)
    for other in (1, 2):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", EXERCISES[other - 1].tests]
        done = subprocess.run(command, cwd=tmp_path / "course", capture_output=True, text=True)
        assert done.returncode == (1 if other == number else 0), done.stdout  # 1: tests ran, and some failed


def test_the_command_line(tmp_path):
    done = run("experiments/exercises.py", "3", "--out", "course", cwd=tmp_path)
    assert "DiffusionBlock.forward" in done.stdout and "test_diffusion_decoder.py" in done.stdout
    assert "exercise 3" in (tmp_path / "course" / "dar.py").read_text()
    assert not list(Path(tmp_path / "course").glob(".git"))
    assert "course: exists" in run("experiments/exercises.py", "3", "--out", "course", cwd=tmp_path, code=2).stderr
    assert "1 to 5" in run("experiments/exercises.py", "6", cwd=tmp_path, code=2).stderr
