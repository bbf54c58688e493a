"""The job as AllenNLP does it and as the bridge does it: a new interpreter, all test instances, the top 20.

The reference's order of batches is replaced by the bridge's, the same for each test instance, so that both compute the
same numbers: all that differs is how.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import bridge
import lissa
from benchmarks.simple_influence.workloads import Workload, collated

warnings.filterwarnings("ignore", category=bridge.InfluenceWarning)

from allennlp.interpret.influence_interpreters import SimpleInfluence as Theirs  # noqa: E402
from allennlp.nn.util import move_to_device  # noqa: E402

Job = Callable[[], Any]

SEED = 0
BATCH_SIZE = 8  # the default of both


class SameOrder:
    """A LiSSA loader for AllenNLP with the order of the bridge's seed, which starts anew for each test instance."""

    def __init__(self, instances: list[Any], steps: int, device: torch.device):
        self.instances, self.steps, self.device = instances, steps, device

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(SEED)
        for indices in itertools.islice(
            lissa.index_stream(len(self.instances), BATCH_SIZE, generator=generator), self.steps
        ):
            yield move_to_device(collated([self.instances[i] for i in indices.tolist()]), self.device)


def theirs(workload: Workload, tests: int, settings: dict[str, Any], *, same_order: bool = False) -> Any:
    """AllenNLP's outputs."""
    device = next(workload.model.parameters()).device
    influence = Theirs(workload.model, "train", workload.reader, cuda_device=device, **settings)
    if same_order:
        influence._lissa_dataloader = SameOrder(workload.train, influence._lissa_dataloader.batches_per_epoch, device)
    return influence, influence.interpret_instances(workload.test[:tests], k=20)


def ours(workload: Workload, tests: int, settings: dict[str, Any], **more: Any) -> Any:
    """The bridge's outputs."""
    influence = bridge.SimpleInfluence(
        workload.model, "train", workload.reader, cuda_device=None, progress=False, seed=SEED, **settings, **more
    )
    return influence, influence.interpret_instances(workload.test[:tests], k=20)
