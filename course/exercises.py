"""What a handout says, and the copy of the project that a student gets."""

import ast
import re
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import NamedTuple

COURSE = Path(__file__).resolve().parent
PROJECT = COURSE.parent

# A student's copy carries here, in one file, the project as it was handed out.
HANDED_OUT = COURSE / "handed_out.zip"

# What a student gets, and the part of it that is needed to run the graded tests.
COPIED_FILES = ("*.py", "pyproject.toml", "requirements*.txt", "README.md", "LICENSE")
COPIED_FOLDERS = ("assets", "checkpoints", "common", "course", "experiments", "tests")
NOT_COPIED = ("__pycache__", "*.tmp", "TEACHERS.md")
NEEDED_TO_GRADE = ("dar.py", "fid.py", "common/*.py", "course/*.py", "course/tests/*.py")


class Exercise(NamedTuple):
    number: int
    title: str
    text: str  # the handout, and how to hand in
    file: str  # holds the functions
    docstrings: dict[str, str]  # {function to be written, as Class.method: what it should do}
    points: dict[str, int]  # {test: its points}

    @property
    def full_points(self) -> int:
        return sum(self.points.values())


def read_exercise(path: Path) -> Exercise:
    """handouts/N.md. Its title, the file in "Write in `FILE`", the functions in its first block of
    Python, which have their docstrings there, and its table of | points | `test` |."""
    text = path.read_text(encoding="utf-8")
    hand_in = path.with_name("hand_in.md").read_text(encoding="utf-8")  # the same for all
    title = re.search(r"^# Exercise \d+: (.*)", text, re.MULTILINE)[1]
    file = re.search(r"^Write in `([\w.]+)`", text, re.MULTILINE)[1]
    block = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    docstrings = {}
    for name, node in all_functions(ast.parse(block)).items():
        if ast.get_docstring(node) is not None:  # others only say where a function stands
            docstrings[name] = ast.get_docstring(node)
    points = {}
    for number, test in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE):
        points[test] = int(number)
    text += hand_in.format(file=file, number=path.stem)
    return Exercise(int(path.stem), title, text, file, docstrings, points)


def read_exercises() -> dict[int, Exercise]:
    exercises = {}
    for path in sorted((COURSE / "handouts").glob("[0-9]*.md")):
        exercise = read_exercise(path)
        exercises[exercise.number] = exercise
    return exercises


def all_functions(tree: ast.AST, prefix: str = "") -> dict[str, ast.FunctionDef]:
    """{dotted name: node} of the functions, also those in classes and in other functions."""
    functions = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = prefix + node.name
            if isinstance(node, ast.FunctionDef):
                functions[name] = node
            functions.update(all_functions(node, f"{name}."))
    return functions


# ------------------------------------------------------------------------------
# The student's copy


def blank(source: str, exercise: Exercise) -> str:
    """The source, in which each function of the exercise has the handout's docstring, and one line
    that raises NotImplementedError. Signatures and decorators stay. Raises ValueError if a function
    is not there."""
    functions = all_functions(ast.parse(source))
    missing = [name for name in exercise.docstrings if name not in functions]
    if missing:
        raise ValueError(f"exercise {exercise.number}: {exercise.file} has no {missing[0]}")
    lines = source.splitlines(keepends=True)
    last_first = sorted(exercise.docstrings, key=lambda name: -functions[name].lineno)
    for name in last_first:  # so that the numbers of the lines before stay right
        node = functions[name]
        body = f'"""{exercise.docstrings[name]}"""\nraise NotImplementedError("{name}")\n'
        indent = " " * node.body[0].col_offset
        start = node.body[0].lineno - 1
        lines[start : node.end_lineno] = [textwrap.indent(body, indent)]
    return "".join(lines)


def handed_out(exercise: Exercise) -> dict[str, bytes]:
    """{path: contents} of what grading needs, with the functions of the exercise blank: the same
    for the teacher and in a student's copy, whatever else was changed there."""
    if HANDED_OUT.exists():
        with zipfile.ZipFile(HANDED_OUT) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    files = solved()
    source = files[exercise.file].decode("utf-8")
    files[exercise.file] = blank(source, exercise).encode("utf-8")
    return files


def solved() -> dict[str, bytes]:
    """{path: contents} of what grading needs, from this project."""
    files = {}
    for pattern in NEEDED_TO_GRADE:
        for path in sorted(PROJECT.glob(pattern)):
            files[path.relative_to(PROJECT).as_posix()] = path.read_bytes()
    return files


def write_copy(exercise: Exercise, folder: Path) -> None:
    """Raises ValueError if the folder exists or would be copied into itself."""
    check_new_folder(folder)
    copy_project(folder)
    files = handed_out(exercise)
    (folder / exercise.file).write_bytes(files[exercise.file])
    (folder / "EXERCISE.md").write_text(exercise.text, encoding="utf-8")
    with zipfile.ZipFile(folder / HANDED_OUT.relative_to(PROJECT), "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)


def check_new_folder(folder: Path) -> None:
    if HANDED_OUT.exists():
        raise ValueError("this is a student's copy; copies are made of the project itself")
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    for name in COPIED_FOLDERS:
        if PROJECT / name in folder.resolve().parents:
            raise ValueError(f"{folder}: lies in {name}, which is copied; name one outside of it")


def copy_project(folder: Path) -> None:
    folder.mkdir(parents=True)
    for pattern in COPIED_FILES:
        for path in PROJECT.glob(pattern):
            shutil.copy(path, folder)
    for name in COPIED_FOLDERS:
        if (PROJECT / name).is_dir():
            ignored = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(PROJECT / name, folder / name, ignore=ignored)


# ------------------------------------------------------------------------------
# Gradescope

SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, when it builds the container.
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -r /autograder/source/project/requirements.txt
"""

RUN = """\
#!/usr/bin/env bash
# Gradescope runs this for each submission. If the grader itself does not work, no results.json is
# written, and Gradescope says that the autograder failed, instead of giving no points.
root="${{AUTOGRADER_ROOT:-/autograder}}"
export PATH="$root/venv/bin:$PATH"
cd "$root/source/project"
exec python3 -m course {number} --grade "$root/submission" --json "$root/results/results.json"
"""


def write_gradescope(exercise: Exercise, folder: Path) -> None:
    """A folder whose contents, zipped, are an autograder. Raises ValueError as write_copy does."""
    check_new_folder(folder)
    copy_project(folder / "project")
    scripts = {"setup.sh": SETUP, "run_autograder": RUN.format(number=exercise.number)}
    for name, text in scripts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8", newline="\n")
        path.chmod(0o755)
