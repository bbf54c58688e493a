"""Settings that all tests share."""

import torch
from hypothesis import HealthCheck, settings

# No test is timed: a first call may compile, and machines differ. The same examples on every run.
settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")

# The tensors are small and the test processes many: more threads would wait for each other.
torch.set_num_threads(1)
