"""Influence functions for models and datasets: AllenNLP's `SimpleInfluence`, on pure functions.

Everything that knows modules, instances, files and screens; the numerics are in `lissa`.
"""

from bridge.data import DataLoader, DatasetReader, Instance, Lazy, SimpleDataLoader
from bridge.diagnostics import Diagnostics, InfluenceWarning
from bridge.interpreter import BothEnds, InfluenceInterpreter, InstanceInfluence, InstanceWithGrads, InterpretOutput
from bridge.inverse_hvp import get_hvp, get_inverse_hvp_lissa
from bridge.outputs import EstimatedOutput, InfluenceEstimate
from bridge.simple_influence import SimpleInfluence

__all__ = [
    "BothEnds",
    "DataLoader",
    "DatasetReader",
    "Diagnostics",
    "EstimatedOutput",
    "InfluenceEstimate",
    "InfluenceInterpreter",
    "InfluenceWarning",
    "Instance",
    "InstanceInfluence",
    "InstanceWithGrads",
    "InterpretOutput",
    "Lazy",
    "SimpleDataLoader",
    "SimpleInfluence",
    "get_hvp",
    "get_inverse_hvp_lissa",
]
