"""Teaching with the project: exercises, their copies for students, and a grader. `python -m course`
lists what there is; TEACHERS.md is the page for teachers.

    exercises.py   what a handout says, and the copy of the project that a student gets
    grader.py      a submission, the processes that test it, and its points
    runner.py      what such a process runs
    handouts/      the exercises: text, docstrings, points
    tests/         the tests that give the points
"""
