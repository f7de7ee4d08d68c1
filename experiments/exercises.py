"""README, "Teach with it": takes the functions of an exercise out of the code, and grades what students write instead.

    python experiments/exercises.py                       the exercises
    python experiments/exercises.py 2 --out course        a copy of the project in which exercise 2 is to be written
    python experiments/exercises.py 2 --grade alice bob   the points of these copies; --csv FILE, --json FILE
    python experiments/exercises.py 1 2 3 --check         for each of them alone: which exercises' tests turn red

An exercise is a text in handouts/, which says what is to be written and which tests give how many points. Of each
function to be written only the body goes: signature and docstring, which say what is wanted, stay.

Grading takes nothing from a student's copy but the text of these functions, and puts it into a clean copy of the
project. The tests run there in a process of their own with limits of time, memory and file size. So a syntax error, an
endless loop or an exit costs its author the test that it happens in, and nobody else anything. (Linux and macOS.)
This is no sandbox: the process may do all that you may, it can read other submissions, and who tries can forge its
results. So grade strangers' code in a container for each student, without network, as Gradescope does.
"""

import argparse
import ast
import contextlib
import csv
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dar

try:
    import resource
except ImportError:  # Windows: no limits of memory and file size
    resource = None

ROOT = Path(dar.__file__).resolve().parent
TEST_SECONDS, ALL_SECONDS, ALL_RUNS = 60, 600, 5  # for one test; for one student; processes for one student
MEMORY, FILE_SIZE, SOURCE_SIZE = 12 * 2**30, 2**26, 2**20  # bytes: torch alone takes some GB of addresses


class Exercise(NamedTuple):
    number: int
    text: str  # the handout
    title: str
    file: str  # that holds the functions
    functions: list[str]  # taken out; Class.method where they are methods
    points: dict[str, int]  # {file::test function: its points}


def read_exercise(path: Path) -> Exercise:
    """handouts/N.md: its title, its line "Write in `FILE`: `function`, ..." and its table of "| points | `test` |"."""
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# Exercise \d+: (.*)", text, re.MULTILINE)[1]
    file, functions = re.search(r"^Write in `([\w.]+)`: (.*)", text, re.MULTILINE).groups()
    points = {test: int(points) for points, test in re.findall(r"^\| (\d+) \| `(tests/\S+)` \|", text, re.MULTILINE)}
    return Exercise(int(path.stem), text, title, file, re.findall(r"`([\w.]+)`", functions), points)


EXERCISES = [read_exercise(path) for path in sorted(Path(__file__).with_name("handouts").glob("*.md"))]


# Taking functions out, and putting others in


def functions_of(source: str) -> dict[str, ast.FunctionDef]:
    """{function or Class.method: its node}. Raises ValueError if the source is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise ValueError(f"not Python ({where}{getattr(error, 'msg', error)})") from None
    found = {}
    for node in tree.body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    return found


def blank(source: str, functions: list[str], number: int) -> str:
    """The source with these functions' bodies replaced by one line that raises NotImplementedError."""
    lines, found = source.splitlines(keepends=True), functions_of(source)
    for name in sorted(functions, key=lambda name: -found[name].lineno):  # from the end, so that line numbers hold
        first = found[name].body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = first.end_lineno if documented else first.lineno - 1
        line = f'{" " * first.col_offset}raise NotImplementedError("exercise {number}: {name}")\n'
        lines[start : found[name].end_lineno] = [line]
    return "".join(lines)


def take(path: Path, functions: list[str]) -> dict[str, str]:
    """{function: its text, from def to its end} of a student's file. Raises ValueError if none can be taken."""
    try:
        if not path.is_file() or path.stat().st_size > SOURCE_SIZE:
            raise ValueError(f"{path.name} is missing, no file, or larger than {SOURCE_SIZE // 1024} KB")
        source = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    found, lines = functions_of(source), source.split("\n")
    return {
        name: "\n".join(lines[found[name].lineno - 1 : found[name].end_lineno]) for name in functions if name in found
    }


def put(source: str, taken: dict[str, str]) -> str:
    """The source with these functions' texts in the place of its own; decorators stay as they were."""
    lines, found = source.split("\n"), functions_of(source)
    for name in sorted(taken, key=lambda name: -found[name].lineno):
        lines[found[name].lineno - 1 : found[name].end_lineno] = taken[name].split("\n")
    joined = "\n".join(lines)
    if functions_of(joined).keys() != found.keys():
        raise ValueError("its functions are indented unlike the project's")
    return joined


def write_copy(folder: Path, exercise: Exercise, taken: dict[str, str] | None = None) -> None:
    """The project without runs and git, and with the exercise's functions blank; or, to grade, with those taken from a
    student and without what no grading test needs. Raises ValueError if the folder exists."""
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    wanted = ["*.py", "*.toml", "tests", "experiments", *(["*.txt", "*.md", "checkpoints", "assets"] * (taken is None))]
    folder.mkdir(parents=True)
    for path in (path for pattern in wanted for path in sorted(ROOT.glob(pattern))):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    path = folder / exercise.file
    source = blank(path.read_text(encoding="utf-8"), exercise.functions, exercise.number)
    path.write_text(put(source, taken or {}), encoding="utf-8")
    if taken is None:
        (folder / "EXERCISE.md").write_text(exercise.text, encoding="utf-8")


# Running the tests

PLUGIN = """
import json, os, sys
RECORD, TOKEN = int(os.environ.pop("GRADING_RECORD")), sys.stdin.readline().strip()
def note(kind, case, text=""):
    os.write(RECORD, (json.dumps([TOKEN, kind, case, text]) + "\\n").encode())
def pytest_collection_finish(session):
    for item in session.items:
        note("collected", item.nodeid)
def pytest_runtest_logstart(nodeid, location):
    note("started", nodeid)
def pytest_runtest_logreport(report):
    if report.outcome != "passed":
        note("failed", report.nodeid, str(report.longrepr)[-1500:])
    if report.when == "teardown":
        note("finished", report.nodeid)
"""


def run_once(folder: Path, wanted: list[str], record: Path, seconds: float) -> list[list[str]]:
    """One run of pytest in the copy: the plugin's notes [kind, case, text], as far as it came in this time."""
    token = secrets.token_hex(16)

    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "grading_plugin",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        *wanted,
    ]
    with open(record, "wb") as notes, open(record.with_suffix(".out"), "wb") as out:
        environment = os.environ | {"GRADING_RECORD": str(notes.fileno()), "PYTHONPATH": str(record.parent)}
        options = dict(stdout=out, stderr=out, pass_fds=[notes.fileno()], start_new_session=True, env=environment)
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, preexec_fn=resource and limits, text=True, **options
        )
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(token + "\n")
            process.stdin.close()
        end, size, since = time.monotonic() + seconds, 0, time.monotonic()
        while process.poll() is None and time.monotonic() < end and time.monotonic() - since < TEST_SECONDS:
            time.sleep(0.05)
            if record.stat().st_size != size:
                size, since = record.stat().st_size, time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the tests left running
        process.wait()
    found = []
    for line in record.read_bytes().decode(errors="replace").split("\n"):
        with contextlib.suppress(ValueError):  # a line that was cut off, or is another's
            words = json.loads(line)
            if isinstance(words, list) and len(words) == 4 and words[0] == token:
                found.append(words[1:])
    return found


def run_tests(folder: Path, tests: list[str]) -> dict[str, str]:
    """{test function: "" if all its cases passed, otherwise why not}. A case in which the process ends or hangs has
    failed, and those after it get a new process, a few times."""
    cases, wanted, end = {}, tests, time.monotonic() + ALL_SECONDS  # {case: None, "" or why it failed}
    with tempfile.TemporaryDirectory() as place:
        Path(place, "grading_plugin.py").write_text(PLUGIN)
        for _ in range(ALL_RUNS):
            running = None
            for kind, case, text in run_once(folder, wanted, Path(place, "record"), end - time.monotonic()):
                running = case if kind == "started" else None if kind == "finished" else running
                if kind == "collected":
                    cases.setdefault(case, None)
                elif kind == "failed":
                    cases[case] = text
                elif kind == "finished":
                    cases[case] = cases[case] or ""
            if running:
                cases[running] = f"the process ended, or took over {TEST_SECONDS} s"
            wanted = [case for case, why in cases.items() if why is None]
            if not running or not wanted or time.monotonic() > end:
                break
    result = {}
    for test in tests:
        mine = [why for case, why in cases.items() if case == test or case.startswith(f"{test}[")]
        missing = "did not run" if not mine or None in mine else ""
        result[test] = next((why for why in mine if why), missing)
    return result


class Graded(NamedTuple):
    folder: Path
    remark: str  # one line, empty if there is nothing to say
    failed: dict[str, str]  # {test: why it failed, "" if it passed}
    points: int
    seconds: float


def grade(exercise: Exercise, folder: Path) -> Graded:
    """The student's points, whatever stands in the folder."""
    began, remark, failed = time.monotonic(), "", dict.fromkeys(exercise.points, "no such function")
    try:
        taken = take(folder / exercise.file, exercise.functions)
        missing = [name for name in exercise.functions if name not in taken]
        remark = f"missing: {', '.join(missing)}" if missing else ""
        if taken:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
                write_copy(Path(place, "copy"), exercise, taken)
                failed = run_tests(Path(place, "copy"), list(exercise.points))
    except ValueError as error:
        remark = " ".join(str(error).split())
    points = sum(points for test, points in exercise.points.items() if failed[test] == "")
    return Graded(folder, remark, failed, points, time.monotonic() - began)


def write_json(path: Path, exercise: Exercise, graded: Graded) -> None:
    """results.json as Gradescope's autograder reads it."""
    tests = [
        {
            "name": test,
            "score": points * (graded.failed[test] == ""),
            "max_score": points,
            "output": graded.failed[test],
        }
        for test, points in exercise.points.items()
    ]
    text = json.dumps({"score": graded.points, "output": graded.remark, "tests": tests}, indent=1)
    dar.write_atomically(path, lambda file: file.write(text.encode()))


def check(exercise: Exercise) -> dict[int, tuple[int, int]]:
    """{exercise: how many of its grading tests (fail, pass)} while this one is blank."""
    with tempfile.TemporaryDirectory() as place:
        write_copy(Path(place, "copy"), exercise, {})
        failed = run_tests(Path(place, "copy"), [test for other in EXERCISES for test in other.points])
    reds = {other.number: [bool(failed[test]) for test in other.points] for other in EXERCISES}
    return {number: (sum(red), len(red) - sum(red)) for number, red in reds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help=f"of exercises, 1 to {len(EXERCISES)}")
    parser.add_argument("--out", type=Path, help="new folder for the copy, with its EXERCISE.md")
    parser.add_argument("--grade", type=Path, nargs="+", metavar="FOLDER", help="students' copies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --grade: one student's results for Gradescope")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --grade: a table of all students")
    parser.add_argument("--check", action="store_true", help="run all grading tests with each exercise blank")
    args = parser.parse_args()
    for number in args.numbers:
        dar.require(1 <= number <= len(EXERCISES), f"exercise {number}: there are 1 to {len(EXERCISES)}")
    exercises = [EXERCISES[number - 1] for number in args.numbers]
    single = len(exercises) == 1 or not (args.out or args.grade)
    dar.require(single, "--out and --grade are for one exercise; give one number")
    dar.require(args.grade or not (args.json or args.csv), "--json and --csv need --grade FOLDER")
    dar.require(not args.json or len(args.grade) == 1, "--json is for one FOLDER; --csv takes many")
    for path in filter(None, (args.json, args.csv)):
        dar.require(
            path.absolute().parent.is_dir() and not path.is_dir(), f"{path}: expected a file in a folder that exists"
        )
    if args.out:
        write_copy(args.out, exercises[0])
        print(f"wrote {args.out}; what to do stands in {args.out / 'EXERCISE.md'}")
    table = open(args.csv, "w", newline="", encoding="utf-8") if args.csv else io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["folder", "exercise", "points", "of", "seconds", "remark"])
    for folder in args.grade or ():
        graded, full = grade(exercises[0], folder), sum(exercises[0].points.values())
        for test, points in exercises[0].points.items() if len(args.grade) == 1 else ():
            why = (graded.failed[test].strip().splitlines() or [""])[-1]
            print(f"{points if why == '' else 0} of {points}  {test}  {why:.100}")
        print(f"{folder}: {graded.points} of {full} points, {graded.seconds:.0f} s  {graded.remark:.200}", flush=True)
        rows.writerow([folder, exercises[0].number, graded.points, full, f"{graded.seconds:.0f}", graded.remark])
        table.flush()  # a course's grading takes a while, and may be stopped
        if args.json:
            write_json(args.json, exercises[0], graded)
    for exercise in exercises if args.check else ():
        print(f"exercise {exercise.number}, {exercise.title}:")
        for number, (red, green) in check(exercise).items():
            print(f"  grading tests of {number}: {red:3} fail {green:3} pass", flush=True)
    for exercise in EXERCISES if not args.numbers else ():
        points = sum(exercise.points.values())
        print(
            f"{exercise.number} {exercise.title}, {points} points: {', '.join(exercise.functions)} in {exercise.file}"
        )


if __name__ == "__main__":
    dar.command_line(main)
