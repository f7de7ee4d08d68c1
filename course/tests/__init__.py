"""The graded tests: a module for each exercise, plain functions with a promise each. They can also
be run with python -m pytest course/tests/exercise_1.py."""
