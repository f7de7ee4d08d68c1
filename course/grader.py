"""A submission, the processes that test it, and its points.

The student's file is taken as it is, nothing else of a submission, and put into a clean copy of the
project as it was handed out. There the graded tests run, in a process of their own that ends after
the first test that ends or hangs it; the tests after that one get a new process and a new copy. A
student's own command does the same, from the clean copy in handed_out.zip.

This is no sandbox: TEACHERS.md says what is not kept apart.
"""

import ast
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from course.exercises import HANDED_OUT, Exercise, all_functions, handed_out, solved

TEST_SECONDS = 120
SUBMISSION_SECONDS = 900  # for all tests of a submission together
SUBMISSION_SIZE = 2**20  # bytes
OUTPUT_SIZE = 2**20  # bytes of a process's results that are read


class Grade(NamedTuple):
    reasons: dict[str, str]  # {test: "" if it passed, or why not}
    remark: str  # one line, empty if there is nothing to say
    points: int
    seconds: float


# ------------------------------------------------------------------------------
# The student's file


def read_submission(path: Path, name: str) -> bytes:
    """The student's file of this name: path itself, or in a folder or .zip; of several there, the
    one with the fewest folders before it. Raises ValueError if there is none to be read."""
    try:
        if path.is_dir():
            return read_from_folder(path, name)
        if path.suffix.lower() == ".zip":
            return read_from_zip(path, name)
        return read_file(path)
    except Exception as error:  # a damaged archive can fail in any way
        raise ValueError(f"cannot be read ({error})") from None


def read_from_folder(folder: Path, name: str) -> bytes:
    if (folder / name).exists():
        return read_file(folder / name)
    paths = [path for path in folder.rglob("*") if "__MACOSX" not in path.parts]
    files = [path for path in paths if path.name == name]
    archives = [path for path in paths if path.suffix.lower() == ".zip"]
    if not files and len(archives) == 1:
        return read_from_zip(archives[0], name)
    return read_file(only_highest(files, name))


def read_from_zip(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        entries = {}
        for info in archive.infolist():
            entry = PurePosixPath(info.filename.replace("\\", "/"))
            if entry.name == name and not info.is_dir():
                entries[entry] = info
        info = entries[only_highest(list(entries), name)]
        check_size(info.file_size)
        return archive.read(info)


def only_highest(paths: list, name: str):
    """The one with the fewest folders before it. Raises ValueError if there are several, or none"""
    depth = min((len(path.parts) for path in paths), default=0)
    highest = [path for path in paths if len(path.parts) == depth]
    if len(highest) != 1:
        raise ValueError(f"{len(highest)} files named {name}: expected one")
    return highest[0]


def read_file(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is no plain file")  # a link may lead to another student's
    check_size(path.stat().st_size)
    return path.read_bytes()


def check_size(size: int) -> None:
    if size > SUBMISSION_SIZE:
        raise ValueError(f"{size} bytes: expected at most {SUBMISSION_SIZE}")


def changed_parts(original: bytes, submitted: bytes, exercise: Exercise) -> list[str]:
    """Names of the functions that the student changed and that are not the exercise's; none if the
    file is no Python, which its tests will say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = all_functions(ast.parse(original))
            after = all_functions(ast.parse(submitted))
            changed = []
            for name, node in before.items():
                is_same = name in after and without_layout(after[name]) == without_layout(node)
                if not is_same and not is_to_be_written(name, exercise):
                    changed.append(name)
            return changed
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def without_layout(node: ast.AST) -> str:
    """The code in one line, equal for any indentation, that of docstrings too."""
    return " ".join(ast.unparse(node).split())


def is_to_be_written(name: str, exercise: Exercise) -> bool:
    """Also a function that holds one, or stands in one."""
    for written in exercise.docstrings:
        if f"{name}.".startswith(f"{written}.") or written.startswith(f"{name}."):
            return True
    return False


# ------------------------------------------------------------------------------
# Points


def grade(exercise: Exercise, path: Path) -> Grade:
    start = time.monotonic()
    files = handed_out(exercise)
    try:
        submitted = read_submission(path, exercise.file)
    except ValueError as error:
        reasons = dict.fromkeys(exercise.points, f"no {exercise.file}")
        return Grade(reasons, " ".join(str(error).split()), 0, time.monotonic() - start)
    changed = changed_parts(files[exercise.file], submitted, exercise)
    remark = ""
    if changed:
        remark = f"also changed: {', '.join(changed)}"
    files[exercise.file] = submitted
    reasons = run_tests(files, exercise)
    passed = [test for test, reason in reasons.items() if reason == ""]
    points = sum(exercise.points[test] for test in passed)
    return Grade(reasons, remark, points, time.monotonic() - start)


def check_itself(exercise: Exercise) -> None:
    """Raises ValueError if this computer cannot grade the exercise: if the project's own solution
    does not pass every test. A student's copy has no solution; there, the blank functions must fail
    every test because they are blank, and for no other reason."""
    if HANDED_OUT.exists():
        for test, reason in run_tests(handed_out(exercise), exercise).items():
            if not reason.startswith("NotImplementedError"):
                reason = reason or "it passes with blank functions"
                raise ValueError(f"the grader does not work here: {test}: {reason}")
    else:
        for test, reason in run_tests(solved(), exercise).items():
            if reason:
                raise ValueError(f"the grader does not work here: {test}: {reason}")


def run_tests(files: dict[str, bytes], exercise: Exercise) -> dict[str, str]:
    """{test: "" if it passed, or why not} in a copy of the project that has these files."""
    reasons = {}
    waiting = list(exercise.points)
    deadline = time.monotonic() + SUBMISSION_SECONDS
    while waiting:
        results, end = run_process(files, exercise, waiting, deadline - time.monotonic())
        imported = "" in results
        for test in waiting:
            if test in results:
                reasons[test] = results[test]
        waiting = [test for test in waiting if test not in reasons]
        if waiting and imported and time.monotonic() < deadline:
            reasons[waiting.pop(0)] = end  # the tests run in order, so it was this one
        elif waiting:
            reasons.update(dict.fromkeys(waiting, end))
            waiting = []
    return {test: reasons[test] for test in exercise.points}


# ------------------------------------------------------------------------------
# Processes


def run_process(
    files: dict[str, bytes], exercise: Exercise, tests: list[str], seconds: float
) -> tuple[dict[str, str], str]:
    """Runs these tests in one process, in a new copy. Returns what the runner reported, {test:
    reason}, and how the process ended. Nothing that it started is left running."""
    word = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="course-")
    try:
        # The results are in files without a name, which the student's code cannot remove.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            write_files(Path(folder), files)
            module = f"course.tests.exercise_{exercise.number}"
            process = subprocess.Popen(
                [sys.executable, "-m", "course.runner", module, str(TEST_SECONDS), *tests],
                cwd=folder,
                env=clean_environment(folder),
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(word.encode() + b"\n", timeout=max(seconds, 1))
                code = process.poll()
            finally:
                end_processes(process)
            return read_results(stdout, word), describe_end(code, read_tail(stderr))
    finally:
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    (folder / "tmp").mkdir()


def clean_environment(folder: str) -> dict[str, str]:
    """The environment without what changes how Python behaves, such as PYTHONOPTIMIZE, under which
    no assertion fails; with a temporary folder of its own, for who empties that."""
    environment = {}
    for name, value in os.environ.items():
        if name == "PYTHONPATH" or not name.startswith(("PYTHON", "PYTEST")):
            environment[name] = value
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TMPDIR"] = os.path.join(folder, "tmp")
    return environment


def read_results(file, word: str) -> dict[str, str]:
    file.seek(0)
    results = {}
    for line in file.read(OUTPUT_SIZE).decode(errors="replace").split("\n"):
        try:
            given, test, reason = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue  # a line that was cut off, or is not the runner's
        if given == word and isinstance(test, str) and isinstance(reason, str):
            results[test] = reason
    return results


def read_tail(file) -> str:
    """The end of what a process said on stderr."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1500))
    return file.read(1500).decode(errors="replace").strip()


def describe_end(code: int | None, stderr: str) -> str:
    if code is None:
        return f"all tests together took over {SUBMISSION_SECONDS} s"
    if "Timeout (" in stderr:  # the runner's faulthandler, and where it was
        return f"took over {TEST_SECONDS} s\n{stderr}"
    if code < 0:
        return f"the process was ended by signal {-code}\n{stderr}"
    return f"the process ended with code {code}\n{stderr}"


# Every process below this one belongs to the submission that is being graded. On Linux, one whose
# parent has ended is handed to the next parent above that has asked for it, which is this one; so
# also a process in a session of its own is found. Other systems hand it to the first process of
# all: there, only the processes of the runner's session are ended.

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_processes(process: subprocess.Popen) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def end_descendants() -> None:
    if sys.platform != "linux":
        return
    for _ in range(1000):
        pids = descendants(os.getpid())
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def descendants(parent: int) -> list[int]:
    """Children, their children, and so on, from Linux's /proc/PID/stat: PID (NAME) STATE PARENT."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state = path.read_bytes().rpartition(b")")[2].split()
            children.setdefault(int(state[1]), []).append(int(path.parent.name))
    pids = list(children.get(parent, []))
    for pid in pids:  # grows on the way
        pids.extend(children.get(pid, []))
    return pids
