"""What can be found wrong with a run before its processes start: everything that needs no images."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorafair.aggregation.registry import method_of
from lorafair.checkpointing.checkpoint import list_checkpoints, resume_of_restarted
from lorafair.checkpointing.folder import FOLDER
from lorafair.cluster.placement import Placement
from lorafair.cluster.slurm import slurm_job
from lorafair.comparison.plan import Comparison
from lorafair.config.schema import FOLDER_SOURCES, Config
from lorafair.data.listing import existing_root
from lorafair.data.partition import clients_known_before
from lorafair.errors import ConfigError
from lorafair.model.backbone import check_model
from lorafair.model.client_ranks import check_client_ranks
from lorafair.privacy.checks import check_privacy
from lorafair.registry import SOURCES


def check_run(config: Config) -> None:
    """Find the mistakes in a run's method, model, domains, clients and checkpoint. Raises ConfigError."""
    check_privacy(config, method_of(config))
    check_model(config.model)
    _check_domains(config)
    _check_clients(config)
    _check_resume(config)


def check_comparison(comparison: Comparison) -> None:
    """Find the mistakes in all runs before the first one starts. Raises ConfigError that names the entry."""
    models: list[object] = []
    for (setting, method, _), config in comparison.configs.items():
        try:
            check_privacy(config, method_of(config))
            _check_domains(config)
            _check_clients(config)
            if config.model not in models:
                models.append(config.model)
                check_model(config.model)
        except ConfigError as error:
            where = f"compare.methods.{method}" + (f" with compare.settings.{setting}" if setting != "default" else "")
            raise ConfigError(f"{where}: {error}") from error


def check_data(*configs: Config) -> None:
    """Raise DataError for a data.root that is no folder here. `lorafair slurm` leaves that to the nodes of the job."""
    for config in configs:
        if config.data.source in FOLDER_SOURCES and config.data.root is not None:
            existing_root(config.data)


def check_devices(config: Config, placement: Placement) -> None:
    """Raise ConfigError for more processes on the CPU than there are cores: they would only wait for each other."""
    cores = len(os.sched_getaffinity(0))
    devices, accelerator = config.fabric.devices or 1, config.fabric.accelerator
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if placement.launcher == "local" and on_cpu and devices > cores:
        raise ConfigError(
            f"fabric.devices={devices}: this node has {cores} core{'s' if cores > 1 else ''} for processes of this "
            f"user; use fabric.devices={cores}"
        )


def _check_domains(config: Config) -> None:
    known = SOURCES[config.data.source].domains
    for name in config.data.domains or ():
        if known is not None and name not in known:
            raise ConfigError(f"data.domains: {config.data.source} has no domain {name}; there are {', '.join(known)}")


def _check_clients(config: Config) -> None:
    known = config.data.domains or SOURCES[config.data.source].domains
    clients = clients_known_before(config.partition, None if known is None else len(known))
    if clients is None:
        return
    wanted = config.federation.clients_per_round
    if wanted is not None and wanted > clients:
        raise ConfigError(f"federation.clients_per_round={wanted}: there are {clients} clients")
    check_client_ranks(config, clients)


def _check_resume(config: Config) -> None:
    resume = resume_of_restarted(config.folder, config.resume, slurm_job(os.environ))
    path = Path(resume)
    if resume in ("auto", "never"):
        return
    if not path.is_dir():
        raise ConfigError(
            f"resume={resume} is not a readable checkpoint: there is no such folder; give auto, never, a run "
            f"directory, or one of its {FOLDER}/round_<n>"
        )
    if not list_checkpoints(path) and not (path / "state.json").is_file():
        raise ConfigError(
            f"resume={resume} is not a readable checkpoint: it has no {FOLDER}/round_<n> and no state.json; "
            "give a run directory, or one of its checkpoints"
        )
