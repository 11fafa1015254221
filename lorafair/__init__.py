"""Federated LoRA fine-tuning of vision backbones at scale. README.md tells more; importing it imports nothing heavy.

import lorafair

result = lorafair.run("conf/demo.yaml", "rounds=3")
result.mean_accuracy, result.accuracy["hand"], result.metrics["train/loss"]
model = result.load_model()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafair.aggregation.base import Aggregator, InitialLayer, LayerUpdate
    from lorafair.aggregation.rank_pruning import RankPruning
    from lorafair.aggregation.registry import register_method
    from lorafair.aggregation.smoothing import Smoothing
    from lorafair.commands.clients import count_labels
    from lorafair.commands.compare import ComparisonResult, compare
    from lorafair.commands.plot import plot
    from lorafair.commands.run import RunResult, run
    from lorafair.communication.compression.base import RowCoding, register_compression
    from lorafair.comparison.figures import Figures
    from lorafair.config import (
        CheckpointConfig,
        ClientConfig,
        CompressionConfig,
        Config,
        DataConfig,
        EvaluationConfig,
        FabricConfig,
        FederationConfig,
        LoRAConfig,
        ModelConfig,
        PartitionConfig,
        PrivacyConfig,
        ServerConfig,
        TensorBoardConfig,
        load_config,
    )
    from lorafair.config.options import option
    from lorafair.data.datasets import from_datasets
    from lorafair.data.images import ImageCollection
    from lorafair.data.partition import Client, register_partition
    from lorafair.data.sources import register_source
    from lorafair.errors import ConfigError, LorafairError
    from lorafair.evaluation import Evaluation, register_metric
    from lorafair.model.adapter import CoreShape, LoRAFactors
    from lorafair.model.backbone import register_backbone
    from lorafair.reporting.callbacks import Callback, register_callback
    from lorafair.reporting.loggers import register_logger

__version__ = "0.2.0"

__all__ = [
    "Aggregator",
    "AttackConfig",
    "Callback",
    "CheckpointConfig",
    "Client",
    "ClientConfig",
    "ComparisonResult",
    "CompressionConfig",
    "Config",
    "ConfigError",
    "CoreShape",
    "DataConfig",
    "DefenceConfig",
    "Evaluation",
    "EvaluationConfig",
    "FabricConfig",
    "FederationConfig",
    "Figures",
    "ImageCollection",
    "InitialLayer",
    "LayerUpdate",
    "LoRAConfig",
    "LoRAFactors",
    "LorafairError",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RankPruning",
    "RowCoding",
    "RunResult",
    "ServerConfig",
    "Smoothing",
    "TensorBoardConfig",
    "compare",
    "count_labels",
    "from_datasets",
    "load_config",
    "option",
    "plot",
    "register_backbone",
    "register_callback",
    "register_compression",
    "register_logger",
    "register_method",
    "register_metric",
    "register_partition",
    "register_source",
    "run",
]

# Where each of them is; imported when it is asked for.
_MODULES = {
    "aggregation.base": ("Aggregator", "InitialLayer", "LayerUpdate"),
    "aggregation.rank_pruning": ("RankPruning",),
    "aggregation.registry": ("register_method",),
    "aggregation.smoothing": ("Smoothing",),
    "commands.clients": ("count_labels",),
    "commands.compare": ("ComparisonResult", "compare"),
    "commands.plot": ("plot",),
    "commands.run": ("RunResult", "run"),
    "communication.compression.base": ("RowCoding", "register_compression"),
    "comparison.figures": ("Figures",),
    "config.options": ("option",),
    "data.datasets": ("from_datasets",),
    "data.images": ("ImageCollection",),
    "data.partition": ("Client", "register_partition"),
    "data.sources": ("register_source",),
    "errors": ("ConfigError", "LorafairError"),
    "evaluation": ("Evaluation", "register_metric"),
    "model.adapter": ("CoreShape", "LoRAFactors"),
    "model.backbone": ("register_backbone",),
    "reporting.callbacks": ("Callback", "register_callback"),
    "reporting.loggers": ("register_logger",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only that (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'lorafair' has no attribute {name!r}")
    return getattr(import_module(f"lorafair.{_MODULE_OF.get(name, 'config')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
