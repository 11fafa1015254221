"""Everything that a configuration can name: what is shipped, and what plug-ins add to it.

A shipped entry is the place of an object ("module:name"), which is imported when it is used. A plug-in is a module or a
file that registers more of them; `load_plugins` imports it, on every process alike.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from lorafair import third_party
from lorafair.errors import ConfigError, did_you_mean

T = TypeVar("T")

ENTRY_POINTS = "lorafair.plugins"  # the group in which installed packages name the modules that register something


class Registry(Generic[T]):
    """The objects of one kind by name."""

    def __init__(
        self,
        kind: str,
        key: str,
        shipped: Mapping[str, str],
        synonyms: Mapping[str, str] | None = None,
        titles: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.key = kind, key
        self._shipped, self._synonyms, self._titles = dict(shipped), dict(synonyms or {}), dict(titles or {})
        self._added: dict[str, T] = {}
        self._origins: dict[str, object] = {}  # what a user has defined, from which the entry was made

    def add(self, name: str, entry: T, origin: object = None) -> None:
        """Give a name to an object. ConfigError where the name is taken by something else.

        `origin` is the definition behind an entry that is made from one. The same definition may come again, as it does
        when a cell of a notebook is run twice.
        """
        if not name or not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"{name!r} is no name for a {self.kind}: letters, digits, _ and -")
        origin = entry if origin is None else origin
        before = self._origins.get(name)
        if name in self._shipped or (before is not None and _place_of(before) != _place_of(origin)):
            owner = "of lorafair" if before is None else _place_of(before)
            raise ConfigError(f"there is a {self.kind} {name} already, {owner}; register yours under another name")
        self._added[name], self._origins[name] = entry, origin

    def remove(self, name: str) -> None:
        """Take back what `add` has done."""
        del self._added[name], self._origins[name]

    def __getitem__(self, name: str) -> T:
        """The object of this name. ConfigError, with what is possible, where there is none."""
        self.check(name)
        if name in self._added:
            return self._added[name]
        module, _, attribute = self._shipped[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    def check(self, name: object, key: str = "") -> None:
        """Raise ConfigError, with what is possible, where there is no object of this name."""
        if name not in self.names:
            load_entry_points()
        if name in self.names:
            return
        normalized = {_normalized(known): known for known in self.names}
        meant = self._synonyms.get(_normalized(name)) or normalized.get(_normalized(name))
        hint = f"did you mean {meant}? " if meant else did_you_mean(name, self.names)
        raise ConfigError(
            f"{key or self.key}={name} is unknown; {hint}{self.kind}s: {', '.join(self.names) or 'none is registered'}"
        )

    @property
    def names(self) -> list[str]:
        """The names, those of lorafair first."""
        return [*self._shipped, *self._added]

    def title(self, name: str) -> str:
        """What papers call it, for figures and tables; the name itself of what a plug-in registers, or nobody has."""
        return self._titles.get(name, name)

    def is_from_plugin(self, name: str) -> bool:
        """Whether a plug-in has registered this name."""
        return name in self._added

    def is_known_to_others(self, name: str, plugins: Sequence[str]) -> bool:
        """Whether a process that imports these plug-ins has the name, too."""
        if name not in self._added or name in _of_entry_points:
            return True
        module, file = str(getattr(self._origins[name], "__module__", "")), _file_of(self._origins[name])
        imported = [module_name(plugin) for plugin in plugins]
        if any(module == name or module.startswith(f"{name}.") for name in imported):
            return True
        paths = [Path(plugin).resolve() for plugin in plugins if _is_file(plugin)]
        return file is not None and any(path in (file, *file.parents) for path in paths)

    def source_sha256(self, name: str) -> str | None:
        """The sha256 of the file in which a plug-in's object is defined; None for a shipped one.

        What is defined outside of a file, as in a notebook, is identified by its own source text.
        """
        if name not in self._added:
            return None
        origin: Any = self._origins[name]
        if (file := _file_of(origin)) is not None:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            return hashlib.sha256(inspect.getsource(origin).encode()).hexdigest()
        except (OSError, TypeError):
            return hashlib.sha256(_place_of(origin).encode()).hexdigest()


METHODS: Registry[Any] = Registry(
    "method",
    "method.name",
    {
        "fedit": "lorafair.aggregation.fedit:FedIT",
        "lora_fair": "lorafair.aggregation.lora_fair:LoRAFair",
        "fedex_lora": "lorafair.aggregation.fedex_lora:FedExLoRA",
        "fedrot_lora": "lorafair.aggregation.fedrot_lora:FedRotLoRA",
        "fedrpca": "lorafair.aggregation.fedrpca:FedRPCA",
        "fedsa_lora": "lorafair.aggregation.fedsa_lora:FedSALoRA",
        "fedsvd": "lorafair.aggregation.fedsvd:FedSVD",
        "ffa_lora": "lorafair.aggregation.ffa_lora:FFALoRA",
        "flex_lora": "lorafair.aggregation.flex_lora:FlexLoRA",
        "flora": "lorafair.aggregation.flora:FLoRA",
        "florist": "lorafair.aggregation.florist:FLoRIST",
        "het_lora": "lorafair.aggregation.het_lora:HETLoRA",
        "raflora": "lorafair.aggregation.raflora:RaFLoRA",
        "rbla": "lorafair.aggregation.rbla:RBLA",
        "ro_lora": "lorafair.aggregation.ro_lora:RoLoRA",
        "flora_na": "lorafair.aggregation.flora_na:FLoRANA",
        "fedmomentum": "lorafair.aggregation.fedmomentum:FedMomentum",
        "frlora": "lorafair.aggregation.frlora:FRLoRA",
        "glora": "lorafair.aggregation.glora:GLoRA",
        "ravan": "lorafair.aggregation.ravan:Ravan",
        "fed_sb": "lorafair.aggregation.fed_sb:FedSB",
        "fed_plora": "lorafair.aggregation.fed_plora:FedPLoRA",
        "fed_alora": "lorafair.aggregation.fed_alora:FedALoRA",
        "la_lora": "lorafair.aggregation.la_lora:LALoRA",
        "fedask": "lorafair.aggregation.fedask:FedASK",
        "centralized": "lorafair.aggregation.references:Centralized",
        "local_only": "lorafair.aggregation.references:LocalOnly",
    },
    synonyms={"fedavg": "fedit", "average": "fedit", "centralised": "centralized", "local": "local_only"},
    titles={
        "fedit": "FedIT",
        "lora_fair": "LoRA-FAIR",
        "fedex_lora": "FedEx-LoRA",
        "fedrot_lora": "FedRot-LoRA",
        "fedrpca": "FedRPCA",
        "fedsa_lora": "FedSA-LoRA",
        "fedsvd": "FedSVD",
        "ffa_lora": "FFA-LoRA",
        "flex_lora": "FlexLoRA",
        "flora": "FLoRA",
        "florist": "FLoRIST",
        "het_lora": "HETLoRA",
        "raflora": "raFLoRA",
        "rbla": "RBLA",
        "ro_lora": "RoLoRA",
        "flora_na": "FLoRA-NA",
        "fedmomentum": "FedMomentum",
        "frlora": "FRLoRA",
        "glora": "GLoRA",
        "ravan": "RAVAN",
        "fed_sb": "Fed-SB",
        "fed_plora": "Fed-PLoRA",
        "fed_alora": "Fed-ALoRA",
        "la_lora": "LA-LoRA",
        "fedask": "FedASK",
        "centralized": "Centralized",
        "local_only": "Local only",
    },
)
SOURCES: Registry[Any] = Registry(
    "data source",
    "data.source",
    {
        "glyph_domains": "lorafair.data.demo.glyphs:GLYPH_DOMAINS",
        "digits_domains": "lorafair.data.demo.digits:DIGITS_DOMAINS",
        "emoji_domains": "lorafair.data.demo.emoji:EMOJI_DOMAINS",
        "domainnet": "lorafair.data.lists:LISTED",
        "nico": "lorafair.data.lists:LISTED",
        "folder": "lorafair.data.folders:FOLDER",
        "synthetic": "lorafair.data.synthetic:SYNTHETIC",
    },
    synonyms={"imagefolder": "folder", "nico++": "nico", "nicopp": "nico", "glyphs": "glyph_domains"},
)
PARTITIONS: Registry[Any] = Registry(
    "partition",
    "partition.scheme",
    {
        "domain": "lorafair.data.partition:by_domain",
        "dirichlet": "lorafair.data.partition:dirichlet",
        "iid": "lorafair.data.partition:iid",
    },
    synonyms={"uniform": "iid", "noniid": "dirichlet"},
)
COMPRESSIONS: Registry[Any] = Registry(
    "coding",
    "compression",
    {
        "float16": "lorafair.communication.compression.half:Float16",
        "bfloat16": "lorafair.communication.compression.half:BFloat16",
        "int8": "lorafair.communication.compression.integers:Int8",
        "int4": "lorafair.communication.compression.integers:Int4",
        "ternary": "lorafair.communication.compression.ternary:Ternary",
        "unary": "lorafair.communication.compression.unary:Unary",
        "topk": "lorafair.communication.compression.topk:TopK",
        "randomk": "lorafair.communication.compression.randomk:RandomK",
    },
    synonyms={"fp16": "float16", "half": "float16", "bf16": "bfloat16", "randk": "randomk", "sparse": "topk"},
)
METRICS: Registry[Callable[[int], Any]] = Registry("metric", "evaluation.metrics", {})
DEFENCES: Registry[Any] = Registry(
    "defence",
    "defence.name",
    {
        "krum": "lorafair.aggregation.defences.krum:Krum",
        "multi_krum": "lorafair.aggregation.defences.krum:MultiKrum",
        "geometric_median": "lorafair.aggregation.defences.medians:GeometricMedian",
        "trimmed_mean": "lorafair.aggregation.defences.medians:TrimmedMean",
        "median": "lorafair.aggregation.defences.medians:MedianClient",
        "norm_bounding": "lorafair.aggregation.defences.norm_bounding:NormBounding",
        "entry_trimmed_mean": "lorafair.aggregation.defences.by_entry:TrimmedMeanByEntry",
        "entry_median": "lorafair.aggregation.defences.by_entry:MedianByEntry",
    },
    synonyms={"rfa": "geometric_median", "medoid": "median"},
)
BACKBONES: Registry[Any] = Registry("backbone", "model.name", {})
CALLBACKS: Registry[Callable[[], Any]] = Registry("callback", "callbacks", {})
LOGGERS: Registry[Callable[..., Any]] = Registry(
    "logger",
    "loggers",
    {
        "csv": "lorafair.reporting.loggers:csv",
        "wandb": "lorafair.reporting.loggers:wandb",
        "mlflow": "lorafair.reporting.loggers:mlflow",
    },
)
REGISTRIES = {
    "METHODS": METHODS,
    "SOURCES": SOURCES,
    "PARTITIONS": PARTITIONS,
    "DEFENCES": DEFENCES,
    "COMPRESSIONS": COMPRESSIONS,
    "METRICS": METRICS,
    "BACKBONES": BACKBONES,
    "CALLBACKS": CALLBACKS,
    "LOGGERS": LOGGERS,
}

_entry_points_loaded = False
_of_entry_points: set[str] = set()  # names
_files: list[str] = []


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules and files that register something. Raises ConfigError naming the one that cannot be imported."""
    if plugins:
        third_party.make_torchvision_importable()  # they may import torchmetrics or timm
    for plugin in plugins:
        try:
            if _is_file(plugin):
                _import_file(Path(plugin))
            else:
                _import_module(plugin)
        except ConfigError as error:
            raise ConfigError(f"plugins: {plugin}: {error}") from error
        except (Exception, SystemExit) as error:
            kind = type(error).__name__
            raise ConfigError(f"plugins: {plugin} cannot be imported: {kind}: {error}") from error


def resolve_plugin(plugin: str, folder: Path) -> str:
    """The entry of `plugins` with the absolute path of its file, or of its folder with an __init__.py: below `folder`
    where it is there, else as it is seen from the working directory. ConfigError for a path that is in neither place.

    A module that cannot be imported is looked for in `folder`, too.
    """
    places = list(dict.fromkeys((folder.resolve(), Path.cwd())))
    if not _is_file(plugin):
        _add_working_directory()
        beside = [places[0] / f"{plugin}.py", places[0] / plugin]
        if not plugin.isidentifier() or plugin in sys.modules or importlib.util.find_spec(plugin) is not None:
            return plugin
        return next((str(file) for file in beside if _source_of(file).is_file()), plugin)
    for place in places:
        file = place / Path(plugin).expanduser()
        if _source_of(file).is_file():
            return str(file.resolve())
    raise ConfigError(
        f"plugins: there is no file {plugin} in {' or '.join(map(str, places))}; name a .py file, a folder with an "
        "__init__.py, or a module that can be imported"
    )


def loaded_files() -> tuple[str, ...]:
    """The files and folders that `load_plugins` has imported in this process."""
    return tuple(_files)


def load_entry_points() -> None:
    """Import the modules that installed packages name in the entry-point group `lorafair.plugins`, once."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    before = {name for names in REGISTRIES.values() for name in names.names}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else entry.value
            raise ConfigError(f"the plug-in {entry.value} of {package} cannot be imported: {error}") from error
    _of_entry_points.update({name for names in REGISTRIES.values() for name in names.names} - before)


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or os.sep in plugin  # an absolute or a relative path


def module_name(plugin: str) -> str:
    """What an entry of `plugins` is called in sys.modules.

    The name of a file follows from its path: the same on every process, so that what is pickled there is found here.
    """
    if not _is_file(plugin):
        return plugin
    return f"lorafair_plugin_{Path(plugin).stem}_{hashlib.sha256(str(plugin).encode()).hexdigest()[:8]}"


def _source_of(place: Path) -> Path:
    return place if place.suffix == ".py" else place / "__init__.py"


def _import_file(place: Path) -> None:
    """Import a file, or a folder as a package; a file may import what lies beside it, as a script may."""
    name, source = module_name(str(place)), _source_of(place)
    if name in sys.modules:
        return
    is_package = source != place
    spec = importlib.util.spec_from_file_location(
        name, source, submodule_search_locations=[str(place)] if is_package else None
    )
    assert spec is not None
    assert spec.loader is not None
    if not is_package and str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))  # last, so that it hides no installed module
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files.append(str(place))


def _import_module(name: str) -> None:
    _add_working_directory()
    importlib.import_module(name)


def _add_working_directory() -> None:
    """Let modules be imported from there: Python adds the folder of a script, not the one it is called in."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _place_of(entry: object) -> str:
    """Where something is defined: one definition has one place, by whatever name its file is imported."""
    kind = entry if inspect.isclass(entry) or inspect.isroutine(entry) else type(entry)
    name = getattr(entry, "__qualname__", kind.__qualname__)
    file = _file_of(entry)
    return f"{name} in {file}" if file else f"{getattr(entry, '__module__', kind.__module__)}.{name}"


def _file_of(entry: object) -> Path | None:
    """The file of the module in which something is defined; None for a notebook's or the interpreter's."""
    kind = entry if inspect.isclass(entry) or inspect.isroutine(entry) else type(entry)
    file = getattr(sys.modules.get(getattr(entry, "__module__", kind.__module__)), "__file__", None)
    return Path(file).resolve() if file is not None and Path(file).is_file() else None


def _normalized(name: object) -> str:
    return "".join(character for character in str(name).lower() if character.isalnum() or character == "+")
