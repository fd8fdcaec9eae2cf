"""Exit codes of jobs."""

DONE, FAILED, WRONG_OPTIONS = 0, 1, 2
