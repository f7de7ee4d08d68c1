"""README, "Teach with it": takes the functions of an exercise out of the code, and shows which tests then fail.

    python experiments/exercises.py                     the exercises
    python experiments/exercises.py 2 --out course      a copy of the project in which exercise 2 is to be written
    python experiments/exercises.py 1 2 3 --check       for each of them alone: the files in tests/ that turn red

Of each function only the body goes: signature and docstring, which say what is wanted, stay.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dar

ROOT = Path(dar.__file__).resolve().parent


class Exercise(NamedTuple):
    about: str
    file: str  # that holds the functions
    functions: list[str]  # taken out; Class.method where they are methods
    tests: str  # grade it


EXERCISES = [
    Exercise(
        "condition schedule and flow",
        "dar.py",
        ["shift_time", "condition_group", "interpolate", "jump_estimate", "sampling_schedule", "solver_step"],
        "tests/test_schedule.py",
    ),
    Exercise(
        "quantizer", "dar.py", ["VectorQuantizer.nearest_code", "VectorQuantizer.forward"], "tests/test_quantizer.py"
    ),
    Exercise(
        "conditioning and AdaLN-zero",
        "dar.py",
        ["TimeEmbedding.waves", "DiffusionBlock.forward"],
        "tests/test_diffusion_decoder.py",
    ),
    Exercise(
        "guidance and sampling with a KV cache",
        "dar.py",
        ["KVCache.put", "guidance_schedule", "guide", "filter_logits", "gumbel_noise", "generate_groups"],
        "tests/test_generation.py",
    ),
    Exercise("metrics", "fid.py", ["moments", "frechet_distance", "precision_recall"], "tests/test_fid.py"),
]


def blank(source: str, functions: list[str], number: int) -> str:
    """The source with these functions' bodies replaced by one line that raises NotImplementedError."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    for name in sorted(functions, key=lambda name: -found[name].lineno):  # from the end, so that line numbers hold
        first = found[name].body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = first.end_lineno if documented else first.lineno - 1
        line = f'{" " * first.col_offset}raise NotImplementedError("exercise {number}: {name}")\n'
        lines[start : found[name].end_lineno] = [line]
    return "".join(lines)


def write_copy(folder: Path, number: int) -> None:
    """The project without runs and git, exercise `number` taken out. Raises ValueError if the folder exists."""
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    tracked = ["*.py", "*.toml", "*.txt", "*.md", "tests", "experiments", "checkpoints", "assets"]
    folder.mkdir(parents=True)
    for path in (path for pattern in tracked for path in sorted(ROOT.glob(pattern))):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    exercise = EXERCISES[number - 1]
    path = folder / exercise.file
    path.write_text(blank(path.read_text(), exercise.functions, number))


def check(number: int) -> dict[str, tuple[int, int]]:
    """{test file: (failed, passed)} for the grading files of all exercises, with exercise `number` blanked."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        write_copy(folder, number)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", *(exercise.tests for exercise in EXERCISES)]
        report = subprocess.run([*command, "-rA"], cwd=folder, capture_output=True, text=True).stdout
    found = {exercise.tests: [0, 0] for exercise in EXERCISES}
    for word, file in re.findall(r"^(PASSED|FAILED|ERROR) (tests/\w+\.py)", report, re.MULTILINE):
        found[file][word == "PASSED"] += 1
    if not all(map(sum, found.values())):  # pytest is missing, or the copy cannot even be imported
        raise ValueError(f"exercise {number}: some tests did not run: {report.strip()[-200:]!r}")
    return {file: tuple(counts) for file, counts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="of exercises, 1 to 5")
    parser.add_argument("--out", type=Path, help="new folder for the copy")
    parser.add_argument("--check", action="store_true", help="run the grading tests with the exercise blanked")
    args = parser.parse_args()
    for number in args.numbers:
        if not 1 <= number <= len(EXERCISES):
            raise ValueError(f"exercise {number}: there are 1 to {len(EXERCISES)}")
    if args.out and len(args.numbers) != 1:
        raise ValueError("--out: a copy holds one exercise; give one number")
    if args.out:
        write_copy(args.out, args.numbers[0])
        exercise = EXERCISES[args.numbers[0] - 1]
        print(f"wrote {args.out}; to write: {', '.join(exercise.functions)} in {exercise.file}")
        print(f"graded by: cd {args.out} && python -m pytest {exercise.tests}")
    for number in args.numbers if args.check else ():
        print(f"exercise {number}, {EXERCISES[number - 1].about}:")
        for file, (failed, passed) in check(number).items():
            print(f"  {file:34} {failed:3} failed {passed:3} passed", flush=True)
    if not args.numbers:
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number} {exercise.about}: {', '.join(exercise.functions)} in {exercise.file}; {exercise.tests}")


if __name__ == "__main__":
    dar.command_line(main)
