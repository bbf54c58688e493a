"""Claim: on a GPU no step of LiSSA makes the host wait, but for one look at the status every sixteen steps.

Profiles the job of each workload, ten test instances, with 32 and with 96 steps, and divides what is more by the steps
that are more: calls that make the host wait, kernels, and copies.

    python -m benchmarks.simple_influence.waits
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.simple_influence import jobs, workloads
from benchmarks.timing import environment

RESULTS = Path(__file__).parents[1] / "results"
STEPS = 32, 96
TESTS = 10
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def counted(workload: workloads.Workload, steps: int) -> Counter[str]:
    """What a job calls of the driver, by name, and the kernels and copies on the GPU."""
    settings: dict[str, Any] = {"recursion_depth": steps, "measure_residual": False, **workload.settings}
    jobs.ours(workload, TESTS, settings)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        jobs.ours(workload, TESTS, settings)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name.startswith("cuda"):
            found[name] += 1
        elif event.device_type() == DeviceType.CUDA:
            found[name if name.startswith("Mem") else "kernels"] += 1
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in filter(workloads.installed, workloads.WORKLOADS):
        workload = workloads.make(name, "cuda")
        few, many = (counted(workload, steps) for steps in STEPS)
        steps = STEPS[1] - STEPS[0]
        of_a_step = {event: (many[event] - few[event]) / steps for event in sorted(many | few)}
        waits = sum(count for event, count in of_a_step.items() if event in WAITS)
        rows.append({"workload": name, "waits_of_a_step": waits, "of_a_step": of_a_step})
        print(
            f"{name}: {waits:.3f} waits, {of_a_step.get('kernels', 0.0):.1f} kernels a step of {TESTS} vectors",
            flush=True,
        )
        record = {"environment": environment(), "steps": STEPS, "tests": TESTS, "rows": rows}
        (RESULTS / "simple-influence-waits-cuda.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
