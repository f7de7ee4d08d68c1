"""Exercises for a class, and their grades. TEACHERS.md in this folder says how to use them.

python -m course                                   the exercises
python -m course 2 --out copy                      what a student gets for exercise 2
python -m course 2 --grade copy                    its points, test by test
python -m course 2 --grade students/* --csv t.csv  a row for each; goes on where it was stopped
python -m course 2 --gradescope folder             an autograder for Gradescope
python -m course 2 --check                         does grading work on this computer?
"""

import argparse
import csv
import hashlib
import io
import json
import signal
import sys
from pathlib import Path

from common.cli import command_line
from common.files import write_atomically
from course.exercises import (
    HANDED_OUT,
    Exercise,
    handed_out,
    read_exercises,
    write_copy,
    write_gradescope,
)
from course.grader import Grade, adopt_orphans, check_itself, grade, read_submission, run_tests

COLUMNS = ["submission", "exercise", "points", "of", "seconds", "remark", "fingerprint"]


def stop(number: int, frame) -> None:
    """Ctrl-C and SIGTERM: what the grader has started is ended on the way out, undisturbed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_exercises(exercises: dict[int, Exercise]) -> None:
    for exercise in exercises.values():
        functions = ", ".join(exercise.docstrings)
        print(f"{exercise.number} {exercise.title} ({exercise.full_points} points)")
        print(f"  {exercise.file}: {functions}")


def check(exercise: Exercise) -> None:
    """The solution passes every test, and blank functions none."""
    check_itself(exercise)
    if not HANDED_OUT.exists():
        passed = [
            t for t, reason in run_tests(handed_out(exercise), exercise).items() if not reason
        ]
        if passed:
            raise ValueError(f"exercise {exercise.number}: blank functions pass {passed[0]}")
    print(f"exercise {exercise.number}: grading works here", flush=True)


# ------------------------------------------------------------------------------
# Grading


def print_grade(exercise: Exercise, result: Grade) -> None:
    for test, reason in result.reasons.items():
        points = exercise.points[test]
        if reason == "":
            print(f"{points} of {points}  {test}")
        else:
            lines = [line for line in reason.splitlines() if line.strip()]
            print(f"0 of {points}  {test}", *lines[:12], sep="\n        ")


def fingerprint(exercise: Exercise, path: Path) -> str:
    """Changes with the submission and with the tests: who handed in anew is graded anew."""
    files = handed_out(exercise)
    try:
        files[exercise.file] = read_submission(path, exercise.file)
    except ValueError as error:
        files[exercise.file] = str(error).encode("utf-8", "backslashreplace")
    contents = repr(sorted(files.items())).encode()
    return hashlib.sha256(contents).hexdigest()[:16]


def read_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """{(submission, exercise): row} of a table that an earlier call has written. Raises ValueError
    if it is something else."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: exists already, and is no table of this command")
        return {(row["submission"], row["exercise"]): row for row in reader}


def write_table(path: Path, table: dict[tuple[str, str], dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(table.values())
    contents = text.getvalue().encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(contents))


def write_json(path: Path, exercise: Exercise, result: Grade) -> None:
    """results.json, as Gradescope reads it."""
    tests = []
    for test, reason in result.reasons.items():
        points = exercise.points[test]
        score = points if reason == "" else 0
        tests.append({"name": test, "score": score, "max_score": points, "output": reason})
    results = {"score": result.points, "output": result.remark, "tests": tests}
    text = json.dumps(results, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def grade_all(
    exercise: Exercise, paths: list[Path], csv_path: Path | None, json_path: Path | None
) -> None:
    table = {} if csv_path is None else read_table(csv_path)
    check_itself(exercise)
    for path in paths:
        # A name may have letters that no text can hold, as in a zip file from Windows.
        name = str(path).encode("utf-8", "backslashreplace").decode()
        key = (name, str(exercise.number))
        mark = fingerprint(exercise, path)
        if key in table and table[key]["fingerprint"] == mark:
            print(f"{name}: {table[key]['points']} points, as before")
            continue
        result = grade(exercise, path)
        if len(paths) == 1:
            print_grade(exercise, result)
        full = exercise.full_points
        print(f"{name}: {result.points} of {full} points  {result.remark}", flush=True)
        if csv_path is not None:
            seconds = f"{result.seconds:.0f}"
            values = [*key, result.points, full, seconds, result.remark, mark]
            table[key] = dict(zip(COLUMNS, values))
            write_table(csv_path, table)
        if json_path is not None:
            write_json(json_path, exercise, result)


# ------------------------------------------------------------------------------
# The command line


def main() -> None:
    exercises = read_exercises()
    parser = argparse.ArgumentParser(
        prog="python -m course",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("number", nargs="?", type=int, choices=list(exercises), help="of an exercise")
    add("--out", type=Path, metavar="FOLDER", help="write a student's copy to a new folder")
    add("--gradescope", type=Path, metavar="FOLDER", help="write an autograder to a new folder")
    add("--grade", type=Path, nargs="+", metavar="PATH", help="folders, .zip or .py files to grade")
    add("--csv", type=Path, metavar="FILE", help="with --grade: a table of all submissions")
    add("--json", type=Path, metavar="FILE", help="with --grade of one: results for Gradescope")
    add("--check", action="store_true", help="try whether grading works here (all, or one)")
    args = parser.parse_args()

    if args.number is None and (args.out or args.gradescope or args.grade):
        raise ValueError(f"give the number of an exercise, 1 ... {len(exercises)}")
    if (args.csv or args.json) and not args.grade:
        raise ValueError("--csv and --json belong to --grade")
    if args.json and len(args.grade) > 1:
        raise ValueError("--json is for one submission; --csv takes many")
    for path in (args.csv, args.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist")

    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    adopt_orphans()
    exercise = exercises.get(args.number)
    if args.out:
        write_copy(exercise, args.out)
        print(f"wrote {args.out}; its EXERCISE.md says what to do")
    if args.gradescope:
        write_gradescope(exercise, args.gradescope)
        print(f"wrote {args.gradescope}; zip its contents and upload them to Gradescope")
    if args.grade:
        grade_all(exercise, args.grade, args.csv, args.json)
    if args.check:
        for each in exercises.values():
            if exercise in (None, each):
                check(each)
    if not (args.out or args.gradescope or args.grade or args.check):
        print_exercises(exercises)


if __name__ == "__main__":
    command_line(main)
