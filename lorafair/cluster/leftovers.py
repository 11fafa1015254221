"""Variables that another launcher has left in the environment: dropped where nobody would be met by them, else refused.

Lightning and PyTorch read from them who a process is and where it meets the others: by one that is left over it would
wait for minutes for processes that never come, or take itself for another one and print and log nothing.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafair.cluster.placement import PARENT, in_step_of_several, is_of_a_launch
from lorafair.cluster.slurm import has_ended, slurm_job
from lorafair.config.schema import FabricConfig
from lorafair.errors import ConfigError

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_NUMBERS_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_CONNECT_SECONDS = 5.0


def without_leftovers(environ: Mapping[str, str], config: FabricConfig, command: Sequence[str]) -> dict[str, str]:
    """The environment without what another launcher has left in it; `command` is what the user typed.

    Raises ConfigError, with the variables and the line to type, where processes would look for each other by them.
    """
    rest = _without_ended_job(environ)
    if _is_child(rest):
        return rest
    if in_step_of_several(rest) and "TORCHELASTIC_RUN_ID" not in rest:
        _check_address(rest, "SLURM_PROCID", command)
        return {name: value for name, value in rest.items() if not is_of_a_launch(name) or name in _ADDRESS}
    if _is_of_torchrun(rest):
        return rest
    found = [name for name in sorted(rest) if is_of_a_launch(name)]
    nodes = config.num_nodes or 1
    if nodes > 1 and {"NODE_RANK", "GROUP_RANK"} & rest.keys():  # a command on each node
        _check_node(rest, nodes, command)
        found = [name for name in found if name not in (*_ADDRESS, "NODE_RANK", "GROUP_RANK")]
    # A dead torchrun's variables in a step of srun: Slurm's are used.
    elif _is_alone(rest, config) or in_step_of_several(rest):
        return {name: value for name, value in rest.items() if name not in found}
    if found:
        values = ", ".join(f"{name}={rest[name]}" for name in found)
        raise ConfigError(
            f"{values}: left over from another launcher, as neither srun nor torchrun has started this process, and "
            f"its processes would look for each other there; type: {_unset(found, command)}; or use fabric.devices=1"
        )
    return rest


def _is_child(environ: Mapping[str, str]) -> bool:
    """Whether another process of the run has started this one."""
    return "LOCAL_RANK" in environ and environ.get(PARENT) == str(os.getppid())


def _is_alone(environ: Mapping[str, str], config: FabricConfig) -> bool:
    """Whether the run is this process alone, as far as that is known before torch is imported."""
    if (config.num_nodes or 1) > 1:
        return False
    if config.devices is not None or config.accelerator == "cpu":
        return (config.devices or 1) == 1
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len(visible.split(","))
    return gpus <= 1


def _is_of_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process, and is there where it holds the store by which processes meet."""
    numbers = [environ.get(name, "") for name in _NUMBERS_OF_TORCHRUN]
    if not {"TORCHELASTIC_RUN_ID", "MASTER_ADDR"} <= environ.keys() or not all(map(str.isdigit, numbers)):
        return False
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        place = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        with socket.create_connection(place, timeout=_CONNECT_SECONDS):
            return True
    except (OSError, OverflowError):
        return False


def _check_node(environ: Mapping[str, str], nodes: int, command: Sequence[str]) -> None:
    """Raise ConfigError where the command was started on each node with variables by which they cannot meet."""
    variable = "NODE_RANK" if "NODE_RANK" in environ else "GROUP_RANK"
    number = environ[variable]
    if not number.isdigit() or int(number) >= nodes:
        raise ConfigError(
            f"{variable}={number}: with fabric.num_nodes={nodes} the nodes are 0 to {nodes - 1}; set it on each node, "
            "or use fabric.num_nodes=1"
        )
    if missing := [name for name in _ADDRESS if not environ.get(name)]:
        raise ConfigError(
            f"{variable}={number} and fabric.num_nodes={nodes}, but {' and '.join(missing)} not set: the nodes would "
            "wait for each other in vain; set MASTER_ADDR to the first node's name and MASTER_PORT to a free port there"
        )
    _check_address(environ, variable, command)


def _check_address(environ: Mapping[str, str], rank_variable: str, command: Sequence[str]) -> None:
    """Raise ConfigError where the first process is not where the others would look for it."""
    port, address = environ.get("MASTER_PORT", "1"), environ.get("MASTER_ADDR")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"MASTER_PORT={port} is no port from 1 to 65535; type: {_unset(['MASTER_PORT'], command)}")
    if not address or environ.get(rank_variable) != "0":
        return
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address} is no host that is known here ({error.strerror}); it may be left over from another "
            f"launcher; type: {_unset(['MASTER_ADDR'], command)}"
        ) from error
    if not any(_is_of_this_host(family, place) for family, _, _, _, place in found):
        raise ConfigError(
            f"MASTER_ADDR={address} is no address of {socket.gethostname()}, where process 0 is: the others would wait "
            f"for it there; it may be left over from another launcher; type: {_unset(['MASTER_ADDR'], command)}"
        )


def _is_of_this_host(family: int, place: object) -> bool:
    with socket.socket(family) as probe:
        try:
            probe.bind(place)  # type: ignore[arg-type]
        except OSError:
            return False
    return True


def _without_ended_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of a Slurm job that has ended: of a terminal that has outlived it."""
    job = slurm_job(environ)
    if job is None or environ.get("SLURM_PROCID", "0") != "0" or not has_ended(job):
        return dict(environ)
    kept = ("SLURM_CONF", "SLURM_JWT")  # how to reach Slurm
    return {name: value for name, value in environ.items() if not name.startswith("SLURM_") or name in kept}


def _unset(names: Sequence[str], command: Sequence[str]) -> str:
    return " ".join(["env", *(f"-u {name}" for name in names), shlex.join(command)])
