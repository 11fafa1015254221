"""The configuration of a run: what its options are, how they are read, checked and explained."""

from lorafair.config.identity import identity_settings
from lorafair.config.loading import load_config, settle, to_yaml
from lorafair.config.schema import (
    AttackConfig,
    CheckpointConfig,
    ClientConfig,
    CompressionConfig,
    Config,
    DataConfig,
    DefenceConfig,
    EvaluationConfig,
    FabricConfig,
    FederationConfig,
    LoRAConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    ServerConfig,
    TensorBoardConfig,
)
from lorafair.errors import ConfigError

__all__ = [
    "AttackConfig",
    "CheckpointConfig",
    "ClientConfig",
    "CompressionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DefenceConfig",
    "EvaluationConfig",
    "FabricConfig",
    "FederationConfig",
    "LoRAConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "ServerConfig",
    "TensorBoardConfig",
    "identity_settings",
    "load_config",
    "settle",
    "to_yaml",
]
