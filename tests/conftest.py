"""Settings that all tests share."""

from hypothesis import settings

# No test is timed: a first call may compile, and machines differ. The same examples on every run.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")
