"""The grader among honest students of all habits, hostile ones, and teachers' computers. Real
processes, and so slow ones."""

import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from course.exercises import PROJECT, solved

pytestmark = pytest.mark.slow
SOLUTION = solved()["dar.py"].decode("utf-8")
SEARCH = re.search(
    r"    @torch.no_grad\(\)\n    def nearest_code.*?\n\n(?=    def )", SOLUTION, re.DOTALL
)[0]


def run_course(*words, cwd=PROJECT, code=0, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "course", *map(str, words)]
    environment = os.environ | environment
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def grades(cwd: Path, folders: list[Path], table: Path) -> dict[str, int]:
    """{name of the folder: points in exercise 2}, from one call of the command in cwd, which leaves
    nothing in the temporary folder."""
    temporary = table.with_suffix(".temporary")
    temporary.mkdir()
    run_course(2, "--grade", *folders, "--csv", table, cwd=cwd, TMPDIR=str(temporary))
    assert list(temporary.iterdir()) == []
    with open(table, newline="", encoding="utf-8") as file:
        return {Path(row["submission"]).name: int(row["points"]) for row in csv.DictReader(file)}


def hand_in(folder: Path, contents: str | bytes) -> Path:
    folder.mkdir()
    if isinstance(contents, str):
        contents = contents.encode("utf-8")
    (folder / "dar.py").write_bytes(contents)
    return folder


def with_search(text: str) -> str:
    """The solution, where nearest_code is this."""
    return SOLUTION.replace(SEARCH, text.rstrip("\n") + "\n\n")


def with_first_line(line: str) -> str:
    """The solution, where nearest_code does this first."""
    first = "        with torch.autocast"
    assert first in SEARCH
    return with_search(SEARCH.replace(first, f"        {line}\n{first}", 1))


def reindent(source: str, unit: str) -> str:
    """Four spaces become unit, but inside of brackets and strings, where none are needed."""

    def replace(match: re.Match) -> str:
        return unit * (len(match[0]) // 4) + " " * (len(match[0]) % 4)

    return re.sub(r"^ +", replace, source, flags=re.MULTILINE)


# ------------------------------------------------------------------------------
# Honest students

ROWS = "F.normalize(self.embedding.weight.float(), dim=-1)"
IMPORT = "import dataclasses\n"
CLASS = "class VectorQuantizer"


def honest() -> dict[str, str | bytes]:
    """{habit: a right dar.py}."""
    lookup = re.search(r"    def lookup.*?\n\n", SOLUTION, re.DOTALL)[0]
    helper = "def rows_of(q):\n    return " + ROWS.replace("self", "q") + "\n\n\n" + CLASS
    property_ = f"    @property\n    def rows(self):\n        return {ROWS}\n\n"
    hinted = SEARCH.replace("f: Tensor", "f: 'Optional[Tensor]'")
    optional = with_search(hinted).replace(IMPORT, "from typing import Optional\n" + IMPORT, 1)
    loop = "            return torch.stack([(x @ rows.T).argmax(-1) for x in f.float()])"
    latin = "# -*- coding: latin-1 -*-\n# d\xe9j\xe0 vu\n" + SOLUTION
    return {
        "as it is": SOLUTION,
        "a helper above the class": with_search(SEARCH.replace(ROWS, "rows_of(self)")).replace(
            CLASS, helper, 1
        ),
        "a helper at the end": with_search(SEARCH.replace(ROWS, "rows_of(self)"))
        + "\n\n"
        + helper.removesuffix(CLASS),
        "a helper method": with_search(property_ + SEARCH.replace(ROWS, "self.rows")),
        "an import": SOLUTION.replace(IMPORT, "import itertools as it\n" + IMPORT, 1),
        "numpy": SOLUTION.replace(IMPORT, "import numpy as np\n" + IMPORT, 1),
        "type hints": optional,
        "other hints": with_search(SEARCH.replace("f: Tensor) -> Tensor", "f: 'np.ndarray')")),
        "no hints": with_search(SEARCH.replace("f: Tensor) -> Tensor", "f)")),
        "other order": SOLUTION.replace(SEARCH, "").replace(lookup, SEARCH + lookup, 1),
        "functions that call one another": with_search(
            SEARCH.replace(ROWS, "self.lookup(torch.arange(len(self.embedding.weight)))")
        ),
        "a loop": with_search(re.sub(r" +return .*", loop, SEARCH)),
        "a global number": with_search(SEARCH.replace("dim=-1", "dim=LAST")).replace(
            CLASS, "LAST = -1\n\n\n" + CLASS, 1
        ),
        "print": with_first_line("print('here', f.shape)"),
        "assert": with_first_line("assert f.ndim == 3"),
        "a lambda": with_search(
            "    nearest_code = lambda self, f: self.find(f)\n\n"
            + SEARCH.replace("nearest_code", "find")
        ),
        "comments in Chinese": with_first_line("# \u6700\u8fd1\u7684\u7801 \u2264 \U0001f600"),
        "CRLF": SOLUTION.replace("\n", "\r\n"),
        "a BOM": b"\xef\xbb\xbf" + SOLUTION.encode(),
        "Latin-1": latin.encode("latin-1", "replace"),
        "tabs": reindent(SOLUTION, "\t"),
        "two spaces": reindent(SOLUTION, "  "),
    }


def test_honest_students_get_all_points_by_their_own_and_by_the_teachers_command(tmp_path):
    folders = [hand_in(tmp_path / name, source) for name, source in honest().items()]
    run_course(2, "--out", tmp_path / "copy")
    teachers = grades(PROJECT, folders, tmp_path / "teachers.csv")
    assert teachers == dict.fromkeys(honest(), 26)
    some = folders[::4]  # of a kind each; to grade all of them twice takes minutes
    own = grades(tmp_path / "copy", some, tmp_path / "own.csv")
    assert own == {folder.name: teachers[folder.name] for folder in some}


# ------------------------------------------------------------------------------
# Wrong and hostile ones


def hostile(line: str) -> str:
    """Does it in two of the twelve tests; each time the process ends, the rest needs a new one."""
    return with_first_line(f"if len(f) == 4: {line}")


def wrong() -> dict[str, str]:
    return {
        "the farthest": with_search(SEARCH.replace("argmax", "argmin")),
        "in bfloat16": with_search(SEARCH.replace("enabled=False", "torch.bfloat16")),
        "rows of any length": with_search(SEARCH.replace(ROWS, "self.embedding.weight")),
        "renamed": with_search(SEARCH.replace("nearest_code", "nearest_codes")),
        "async": with_search(SEARCH.replace("def ", "async def ")),
        "an exit": hostile("import os; os._exit(0)"),
        "a polite exit": hostile("raise SystemExit(0)"),
        "pytest's skip": hostile("import pytest; pytest.skip()"),
        "closed files": hostile("import os; os.closerange(0, 99)"),
        "a flood": hostile("import os; [os.write(1, b'x' * 10**6) for i in range(99)]"),
        "all memory": hostile("bytearray(2**45)"),
        "an empty temporary folder": hostile(
            "import shutil, tempfile; shutil.rmtree(tempfile.gettempdir()); 1 / 0"
        ),
        "no files left": hostile("import os, shutil; shutil.rmtree(os.getcwd()); os._exit(0)"),
        "forged lines": hostile(
            'import os; [os.write(i, b\'["", "test_the_search_has_no_gradient", ""]\\n\') '
            "for i in range(1, 3)]; os._exit(0)"
        ),
    }


# In these dar.py cannot even be imported.
BROKEN = {
    "a syntax error": with_search(SEARCH.replace("f: Tensor)", "f: Tensor")),
    "an exit when it is read": "raise SystemExit(0)\n",
    "a hard exit when it is read": "import os; os._exit(0)\n",
    "a bomb of brackets": "(" * 10**5,
    "no text": b"\xff\xfe\x00def",
    "nothing": "",
}


def test_wrong_and_hostile_ones_cost_their_authors_points_and_nobody_else(tmp_path):
    cases = {name: hand_in(tmp_path / name, text) for name, text in {**wrong(), **BROKEN}.items()}
    odd = tmp_path / os.fsdecode(b"h\xe9l\xe8ne")  # a name in Latin-1, as in a zip from Windows
    cases["odd"] = hand_in(odd, SOLUTION)
    cases["right"] = hand_in(tmp_path / "right", SOLUTION)
    points = grades(PROJECT, list(cases.values()), tmp_path / "table.csv")
    assert points.pop("right") == 26
    assert points.pop("h\\udce9l\\udce8ne") == 26
    assert all(points[name] == 0 for name in BROKEN), points
    assert all(points[name] < 26 for name in wrong()), points
    assert points["in bfloat16"] > 15 and points["rows of any length"] > 15


def test_a_student_sees_why_dar_py_cannot_be_imported(tmp_path):
    folder = hand_in(tmp_path / "student", BROKEN["a syntax error"])
    assert "SyntaxError" in run_course(2, "--grade", folder).stdout


# ------------------------------------------------------------------------------
# Teachers' computers


def test_settings_of_pytest_and_python_change_no_points(tmp_path):
    """PYTHONOPTIMIZE takes out assertions: without care, everybody would pass."""
    settings = {"PYTEST_ADDOPTS": "-n 2", "PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error"}
    right = hand_in(tmp_path / "right", SOLUTION)
    far = hand_in(tmp_path / "far", wrong()["the farthest"])
    done = run_course(2, "--grade", right, far, PYTHONPATH="/nowhere", **settings)
    assert "right: 26 of 26" in done.stdout
    assert "far: 26 of 26" not in done.stdout


def test_a_grader_that_does_not_work_gives_no_points_at_all(tmp_path):
    """A test that cannot be imported: exit 2, and why."""
    for name, contents in solved().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(contents)
    shutil.copytree(PROJECT / "course" / "handouts", tmp_path / "course" / "handouts")
    (tmp_path / "course" / "tests" / "exercise_2.py").write_text("import no_such_module\n")
    folder = hand_in(tmp_path / "right", SOLUTION)
    done = run_course(2, "--grade", folder, "--csv", "table.csv", cwd=tmp_path, code=2)
    assert "the grader does not work here" in done.stderr
    assert "No module named 'no_such_module'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "table.csv").exists()


def test_a_lower_limit_of_memory_is_no_reason_to_fail(tmp_path):
    folder = hand_in(tmp_path / "right", SOLUTION)

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # below the runner's own limit

    command = [sys.executable, "-m", "course", "2", "--grade", str(folder)]
    done = subprocess.run(
        command, cwd=PROJECT, preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "26 of 26" in done.stdout


LEFT_BEHIND = (
    "import subprocess, sys; "
    "subprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)"
)


def processes_with(mark: str) -> list[int]:
    """Linux: the processes whose environment has this word."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:
            pass
    return pids


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the grader")
def test_what_a_submission_starts_in_a_new_session_is_ended_with_it(tmp_path):
    mark = uuid.uuid4().hex
    folder = hand_in(tmp_path / "student", hostile(LEFT_BEHIND))
    run_course(2, "--grade", folder, COURSE_MARK=mark)
    assert processes_with(mark) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the grader")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_running_and_the_table_whole(number, tmp_path):
    mark = uuid.uuid4().hex
    right = hand_in(tmp_path / "right", SOLUTION)
    loop = hand_in(tmp_path / "loop", with_first_line(LEFT_BEHIND + "\n        while True: pass"))
    words = ["2", "--grade", str(right), str(loop), "--csv", str(tmp_path / "table.csv")]
    process = subprocess.Popen(
        [sys.executable, "-m", "course", *words],
        cwd=PROJECT,
        env=os.environ | {"COURSE_MARK": mark, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(processes_with(mark)) < 3:  # the grader, the runner, what it has left behind
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert stderr.strip() == "stopped"
    assert processes_with(mark) == []
    assert not list(tmp_path.glob("course-*"))
    assert "right: 26 of 26 points" in stdout
    with open(tmp_path / "table.csv", newline="") as file:
        assert [row["points"] for row in csv.DictReader(file)] == ["26"]


def test_an_endless_loop_costs_the_test_that_it_runs_in(tmp_path, monkeypatch, capsys):
    from course import grader
    from course.exercises import read_exercises

    monkeypatch.setattr(grader, "TEST_SECONDS", 30)
    monkeypatch.setattr(grader, "end_descendants", lambda: None)  # pytest has other processes
    loop = hand_in(tmp_path / "loop", with_first_line("while f.numel() == 4 * 100 * 8: pass"))
    result = grader.grade(read_exercises()[2], loop)
    slow = [test for test, reason in result.reasons.items() if reason.startswith("took over 30 s")]
    assert slow == ["test_the_nearest_row_is_nearest_by_distance"]
    assert "nearest_code" in result.reasons[slow[0]]  # where it hung
    assert result.points == 26 - 3
