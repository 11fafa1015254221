"""A digest of all that the training of a cohort reads: cohorts with equal digests come out with equal bits.

It is made of what training gets, not of a list of methods. What is not known to have no effect is in it: a new option,
a new tensor of the server's state or a new field of what a cohort trains with makes digests differ until it is named
here. Where something has no digest, as a function of a method has none, the cohort has none either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from lorafair.checkpointing.partial_round import Cohort
from lorafair.checkpointing.rows import bytes_of
from lorafair.client.training import Trainer
from lorafair.config.identity import flatten
from lorafair.experiment import Experiment
from lorafair.files.shipped import code_sha256
from lorafair.server.recent import RECENT
from lorafair.server.state import ServerState

# Settings that reach a client's training through what it gets, or not at all: parts, start, clients of the round.
_SETTINGS_NOT_READ = (
    "method", "server", "defence", "evaluation", "federation.head_weighting", "federation.weighting",
    "federation.clients_per_round", "federation.initialization",
)  # fmt: skip
# Tensors of the state that the server or the evaluation reads, or that reach a client in what it starts with.
_STATE_NOT_READ = (
    "moments.first", "moments.second", "initial_factors", RECENT, "personal_adapters", "lora_ranks",
    "controls.server", "controls.clients", "missed",
)  # fmt: skip
_MODEL_FIELDS = ("model", "autocast")  # of LocalTraining: described by settings, weights, layout and precision


class _NoDigest(Exception):
    """Something that training reads has none."""


def digests_of(trainer: Trainer, cohorts: Sequence[Cohort]) -> dict[Cohort, str]:
    """The digest of each cohort of the trainer's round; nothing where they have none."""
    digests = {}
    try:
        of_round = _of_round(trainer) if cohorts else ""
        for cohort in cohorts:
            digest = hashlib.sha256()
            _add(digest, (of_round, cohort, trainer.cohort_of(cohort, trainer.steps_of(cohort))))
            digests[cohort] = digest.hexdigest()
    except _NoDigest:
        return {}
    return digests


def _of_round(trainer: Trainer) -> str:
    """What all cohorts of the round read."""
    experiment, state, training = trainer.experiment, trainer.state, trainer.training
    if trainer.rules:  # they may note what a client has sent
        raise _NoDigest
    if experiment.config.privacy.noise_source == "system":  # no two clients train alike
        raise _NoDigest
    fields = {f.name: getattr(training, f.name) for f in dataclasses.fields(training) if f.name not in _MODEL_FIELDS}
    digest = hashlib.sha256()
    _add(digest, code_sha256())
    _add(digest, _arithmetic(experiment))
    _add(digest, _settings(experiment))
    _add(digest, _images(experiment))
    _add(digest, (experiment.layout, experiment.measured))
    _add(digest, {name: t for name, t in state.tensors().items() if name not in _STATE_NOT_READ})
    _add(digest, _changed_weights(experiment, state))
    _add(digest, (state.completed_rounds, experiment.config.seed_of("client")))
    _add(digest, fields)
    return digest.hexdigest()


def _arithmetic(experiment: Experiment) -> tuple[object, ...]:
    """What the last bits depend on."""
    fabric = experiment.fabric
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else ""
    of_cpu = (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.backends.mkldnn.is_available())
    precision = (str(fabric.strategy.precision.precision), torch.get_float32_matmul_precision())
    return (torch.__version__, timm.__version__, np.__version__, fabric.device.type, gpu, *of_cpu, *precision)


def _settings(experiment: Experiment) -> str:
    """All that change numbers but those that training does not read, and all of the groups that it is made of."""
    config = experiment.config
    identity = {key: value for key, value in flatten(experiment.identity).items() if not _is_not_read(key)}
    groups = [dataclasses.asdict(group) for group in (config.model, config.client, config.data, config.partition)]
    return json.dumps([identity, groups], sort_keys=True, default=str)


def _is_not_read(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _SETTINGS_NOT_READ)


def _images(experiment: Experiment) -> tuple[object, ...]:
    """Tokens that were computed ahead may differ in their last bits from those of an image in its batch."""
    return experiment.data.fingerprint, len(experiment.data.train), experiment.inputs.of_tokens


def _changed_weights(experiment: Experiment, state: ServerState) -> Mapping[str, Tensor]:
    """The frozen weights that were folded into; the identity names all of them as they were before."""
    return experiment.model.adapters.base_weights() if state.folded else {}


def _add(digest: Any, value: Any) -> None:
    """Feed a value to a hash, so that no two values feed it alike."""
    if value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode() + bytes_of(value))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, torch.Generator):
        _add(digest, (value.device.type, value.get_state()))
    elif isinstance(value, Mapping):
        _add(digest, [(key, value[key]) for key in sorted(value)])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of;".encode())
        for item in value:
            _add(digest, item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        _add(digest, (type(value).__qualname__, fields))
    else:
        raise _NoDigest
