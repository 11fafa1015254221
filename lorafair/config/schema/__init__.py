"""Every option of a run: its type, default, range, condition and meaning. Here those of the whole run, and its groups.

`lorafair options` prints these files as a table. Values come from the defaults in them, then YAML files, then key=value
arguments (config/loading.py); what is declared here is checked in config/checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorafair.config.options import option
from lorafair.config.schema.client import ClientConfig
from lorafair.config.schema.compression import CompressionConfig
from lorafair.config.schema.data import FOLDER_SOURCES, DataConfig, PartitionConfig
from lorafair.config.schema.fabric import SIGNALS, FabricConfig
from lorafair.config.schema.federation import FederationConfig, ServerConfig
from lorafair.config.schema.model import LoRAConfig, ModelConfig
from lorafair.config.schema.output import CheckpointConfig, EvaluationConfig, TensorBoardConfig
from lorafair.config.schema.privacy import PrivacyConfig
from lorafair.config.schema.robustness import AttackConfig, DefenceConfig

__all__ = [
    "FOLDER_SOURCES",
    "SIGNALS",
    "AttackConfig",
    "CheckpointConfig",
    "ClientConfig",
    "CompressionConfig",
    "Config",
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
]


@dataclass(frozen=True)
class Config:
    """A run.

    Built by `load_config` from YAML files and key=value pairs, or in Python: `Config(rounds=3, method={"name":
    "fedit"})`. A configuration made in Python is checked and completed by `lorafair.run` (or `settle`) with the same
    code as one from YAML.
    """

    seed: int = option(
        0,
        """Seed of everything random: images drawn, split, head, factors, clients of a round, batches, dropout.
        partition.seed, model.seed, federation.seed and client.seed replace it for a part, so that experiments can vary
        the parts one by one.""",
        at_least=0,
    )
    rounds: int = option(50, "Communication rounds.", at_least=1, identity=False)
    run_dir: Path | None = option(
        None,
        "Where checkpoints, TensorBoard curves and results go (runs/<first YAML file>/<method>-seed<seed>).",
        is_path=True,
        identity=False,
    )
    resume: str = option(
        "auto",
        """auto: continue from the run directory's last checkpoint if there is one, else start. never: start from the
        beginning; an earlier run in the same directory is moved aside. Or the path of a checkpoint folder to start
        from.""",
        is_path=True,
        identity=False,
    )
    accept: tuple[str, ...] = option(
        (),
        """Options, and images, classes or frozen_weights, that may differ from the run whose checkpoint is continued;
        the error about a difference names them. Completed rounds stay as they were computed.""",
        identity=False,
    )
    plugins: tuple[str, ...] = option(
        (),
        """Python modules (my_package.methods) and files (./my_method.py; from the YAML file's folder, else from the
        working directory) that register methods, sources, partitions, metrics, backbones, callbacks and loggers.
        Imported on every process before anything is looked up.""",
        identity=False,
    )
    callbacks: tuple[str, ...] = option(
        (), "Callbacks registered by plug-ins (lorafair.register_callback).", names="CALLBACKS", identity=False
    )
    loggers: dict[str, Any] = option(
        {},
        """Loggers of Fabric in addition to TensorBoard and metrics.csv: csv, wandb, mlflow, or those of plug-ins, each
        with its own options: {wandb: {project: lora, offline: true}}.""",
        names="LOGGERS",
        identity=False,
    )
    method: dict[str, Any] = option(
        {"name": "lora_fair"}, "The name of the method, and its options (lorafair methods NAME)."
    )
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)

    def seed_of(self, group: Literal["partition", "model", "client", "federation"]) -> int:
        """The seed of what `group` draws: its own, or that of the run."""
        own: int | None = getattr(self, group).seed
        return self.seed if own is None else own

    @property
    def folder(self) -> Path:
        """run_dir, which `load_config` and `settle` have filled in."""
        assert self.run_dir is not None
        return self.run_dir
