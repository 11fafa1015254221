"""The command as a user types it: on two processes, killed and continued, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorafair import __version__, federation
from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.cli import main
from lorafair.commands.subcommands import SUBCOMMANDS
from lorafair.comparison.section import load_comparison
from lorafair.config.describe import describe_options
from lorafair.config.loading import load_config
from lorafair.errors import ConfigError
from lorafair.files.shipped import shipped_configurations
from lorafair.registry import METHODS
from tests.conftest import damaged_folder

ROOT = Path(__file__).parents[1]
TINY = (
    "data.source=synthetic", "model.name=test_vit", "model.weights=random", "model.image_size=32", "model.lora.rank=4",
    "model.lora.last_blocks=2", "client.optimizer=adamw", "client.learning_rate=0.005", "client.batch_size=16",
    "fabric.accelerator=cpu", "checkpoint.every=1",
)  # fmt: skip


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")
    }
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def adapter(run_dir: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(run_dir)[-1]).tensors["adapter"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["options"]])
def test_a_reader_that_is_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A line of shell, with the command as $LORAFAIR."""
    environment = {**os.environ, "LORAFAIR": f"{sys.executable} train.py"}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize("output", ["/dev/full", "&-"])
def test_an_output_that_cannot_be_written_is_no_error(output: str) -> None:
    """/dev/full is as a full disk, &- as a service that was started without; a terminal that is gone gives EIO."""
    done = shell(f"$LORAFAIR --version >{output}")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"$LORAFAIR run rounds=none 2>{output}")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_a_batch_script_that_cannot_be_written_to_stdout_is_an_error() -> None:
    done = shell("$LORAFAIR slurm synthetic.yaml >/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the script cannot be written to stdout (No space left on device); --out=FILE names a file\n"
    )


@pytest.mark.parametrize("key", ["run_dir", "data.root"])
def test_a_name_that_is_not_utf_8_is_one_line(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "synthetic.yaml", f"{key}=caf\udce9"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: the argument {key}=caf\\udce9 is not UTF-8; rename the file or folder")
    assert said.count("\n") == 1
    with pytest.raises(ConfigError, match=rf"^{key}: caf\\udce9 is not UTF-8"):
        load_config(**{"data.source": "folder", "data.root": "x", key: "caf\udce9"})


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_continued(tmp_path: Path) -> None:
    """The whole command in processes of its own; SIGKILL to all of them once round 3 is saved; bit-equal at the end."""
    arguments = [*TINY, "rounds=12", "fabric.devices=2"]
    killed = start([*arguments, f"run_dir={tmp_path / 'killed'}"])
    whole = start([*arguments, f"run_dir={tmp_path / 'whole'}"])
    deadline = time.monotonic() + 120
    while not any(path.name >= "round_000003" for path in list_checkpoints(tmp_path / "killed")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    code, out, err = finish(start([*arguments, f"run_dir={tmp_path / 'killed'}"]))
    assert code == 0, err
    assert re.search(r"continuing after round \d+ of 12", out)
    code, out, err = finish(whole)
    assert code == 0, err
    assert f"lorafair {__version__}: 2 processes on cpu" in out
    assert re.search(r"^mean +\d+\.\d", out, re.MULTILINE)
    assert torch.equal(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert results[0]["accuracy"] == results[1]["accuracy"]


@pytest.mark.slow
def test_a_started_process_that_is_killed_ends_its_starter_with_a_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*TINY, "rounds=400", "client.steps=60", "fabric.devices=2", f"run_dir={run}"]
    process = start(arguments)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.skip("no list of child processes")
    deadline = time.monotonic() + 120
    while not list_checkpoints(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = (int(number) for number in children.read_text().split())
    os.kill(child, signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 1
    assert "error: process 0 on " in errors
    assert "process 1 was ended by SIGKILL" in errors


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; it must end with status 2 and one line."""
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.name=lora_fare"], r"method\.name=lora_fare is unknown; did you mean lora_fair\?"),
        (["method.name=fedit", "method.solver=sgd"], r"method\.solver is no option of fedit; it belongs to lora_fair"),
        (["method.rescale=3"], r"method\.rescale=3 must be true or false"),
        (["method.regularization=-1"], r"method\.regularization"),
        (["model.lora.targets=[attn.qk]"], r"model\.lora\.targets: attn\.qk matches no linear layer"),
        (
            ["data.source=folder", "data.root=/nowhere/at/all"],
            r"data\.root=/nowhere/at/all is not a folder that exists",
        ),
        (["data.domains=[plain, colourful]"], r"data\.domains: synthetic has no domain colourful; there are plain"),
        (["federation.clients_per_round=4"], r"federation\.clients_per_round=4: there are 3 clients"),
        (["partition.scheme=dirichlet", "partition.min_images=500"], r"too few for partition\.clients_per_domain=5"),
        (["resume=/nowhere"], r"/nowhere is not a readable checkpoint"),
        ([f"run_dir={__file__}"], r"run_dir=.*test_cli\.py cannot be written to \(File exists\)"),
        (["fabric.devices=500"], r"fabric\.devices=500: this node has (\d+) cores? .*; use fabric\.devices=\1$"),
        (["model.lora.rank=1000"], r"model\.lora\.rank=1000 is larger than layer blocks\..* allows: .* of at most "),
        (["model.lora.rank=[4, 2]"], r"model\.lora\.rank=\[4, 2\] lists 2 ranks for 3 clients; list one a client"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(
    changes: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert re.search(message, fails(capsys, *TINY, f"run_dir={tmp_path}", *changes))


def picture_folder(root: Path) -> Path:
    for domain in ("photo", "sketch"):
        for index, name in enumerate(("cat", "dog")):
            (root / domain / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (40, 30), (200 * index, 20 * number, 90)).save(root / domain / name / f"{number}.png")
    return root


def test_a_folder_of_pictures_is_trained_on_and_a_corrupt_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = picture_folder(tmp_path / "pictures")
    arguments = [*TINY, "data.source=folder", f"data.root={root}", "rounds=1"]
    assert main([*arguments, f"run_dir={tmp_path / 'run'}"]) == 0
    corrupt = root / "sketch" / "dog" / "3.png"
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    capsys.readouterr()
    assert str(corrupt) in fails(capsys, *arguments, f"run_dir={tmp_path / 'other'}")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=1"]) == 0
    capsys.readouterr()
    message = fails(capsys, *TINY, f"run_dir={tmp_path}", "rounds=2", "model.name=test_vit2")
    assert "model.name is test_vit there and test_vit2 here" in message


@pytest.mark.slow
def test_a_truncated_checkpoint_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=2"]) == 0
    expected = adapter(tmp_path)
    file = list_checkpoints(tmp_path)[-1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=2"]) == 0
    assert "round_000002 is damaged" in capsys.readouterr().out
    assert "has 2 rounds already" in fails(capsys, *TINY, f"run_dir={tmp_path}", "rounds=1")
    assert torch.equal(adapter(tmp_path), expected)


def test_a_client_with_fewer_images_than_a_batch_is_trained_on_all_it_has(tmp_path: Path) -> None:
    assert main([*TINY, f"run_dir={tmp_path}", "rounds=1", "client.batch_size=500"]) == 0
    assert (tmp_path / "result.json").exists()


# The command line itself


PLUGIN = """
from dataclasses import dataclass
import lorafair
from lorafair.aggregation.fedit import FedIT

@lorafair.register_method("of_a_plugin")
@dataclass(frozen=True)
class Mine(FedIT):
    '''Mine alone.'''

    strength: float = lorafair.option(1.0, "How much.", above=0)
"""


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m lorafair` in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lorafair", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_usage_is_printed_and_nothing_starts(arguments: list[str], tmp_path: Path) -> None:
    done = run_in(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: lorafair SUBCOMMAND ")
    assert [name for name in SUBCOMMANDS if f"  lorafair {name} " not in done.stdout] == []
    assert len(done.stdout.splitlines()) < 25
    assert list(tmp_path.iterdir()) == []


def test_what_only_prints_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lorafair.cli import main\n"
        "for line in ('', '--version', 'run --help', 'run --list', 'options', 'run rounds=0'): main(line.split())\n"
        "print([m for m in ('torch', 'timm', 'lightning', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "error: rounds=0 is out of range: it must be at least 1\n"


def test_the_version_names_the_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"lorafair {__version__}")
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"lorafair \S+ \(commit [0-9a-f]{7,}\+?\)\n", said)


def parsed(arguments: Sequence[str]) -> None:
    """Check a command line with the parser of its subcommand, and its configuration with the loader."""
    if arguments[0] in ("--help", "--version"):
        return
    name, *rest = arguments if arguments[0] in SUBCOMMANDS else [implied(arguments), *arguments]
    given = SUBCOMMANDS[name].parser(name).parse_intermixed_args(rest)
    if not SUBCOMMANDS[name].takes_configuration or "--list" in rest:
        return
    if load_comparison(given.configuration) is None:
        assert name != "compare"
        load_config(given.configuration)


def implied(arguments: Sequence[str]) -> str:
    """The subcommand that `python train.py` does without one."""
    configuration = [word for word in arguments if word.endswith(".yaml") or (word[0] != "-" and "=" in word)]
    return "run" if load_comparison(configuration) is None else "compare"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_a_subcommand_is_short_and_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = " ".join((shown := capsys.readouterr().out).split())
    assert shown.startswith(f"usage: lorafair {name} ")
    assert len(shown.splitlines()) < 45
    assert SUBCOMMANDS[name].description in said
    example = said.partition(" example: ")[2]
    assert f"lorafair {name} " in example
    parsed(shlex.split(example.partition("lorafair ")[2]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seed 1", r"--seed is no option of lorafair run; options are key=value; type: seed=1$"),
        ("--seed=1 demo.yaml", r"type: seed=1$"),
        ("demo.yaml --rounds 3", r"type: rounds=3$"),
        ("run demo.yaml --lr 0.1", r"type: client\.learning_rate=0\.1$"),
        ("run --batch-size=8", r"type: client\.batch_size=8 or evaluation\.batch_size=8$"),
        ("run --rouns 3", r"options are key=value; there is no option rouns; did you mean rounds\?"),
        ("run demo.yaml --resume", r"type: resume=VALUE$"),
        ("run demo.yaml --xyz", r"key=value \(lorafair options lists them\); possible flags: --list --help"),
        ("--config x.yaml", r"--config is no option of lorafair run; files stand alone; type: lorafair run x\.yaml$"),
        ("run --config=x.yaml", r"type: lorafair run x\.yaml$"),
        ("-m", r"-m is no option .* a comparison .*; type: lorafair compare FILE\.yaml$"),
        ("-m demo.yaml seed=1,2", r"type: lorafair compare FILE\.yaml$"),
        ("--doctor demo.yaml seed=1", r"--doctor is now a subcommand; type: lorafair doctor demo\.yaml seed=1$"),
        ("rnu demo.yaml", r"rnu is neither a subcommand, .*; did you mean run\? subcommands: run, compare, prepare"),
        ("nonsense", r"nonsense is neither a subcommand, .*pair; subcommands: run, compare"),
        ("synthtic.yaml", r"synthtic\.yaml is neither a YAML file .*; did you mean synthetic\.yaml\? shipped: "),
        ("run", r"lorafair run needs a FILE\.yaml or key=value; for example: lorafair run synthetic\.yaml$"),
        ("options nogroup", r"there is no group of options nogroup; groups: data, partition, model, model\.lora, "),
        ("options clients", r"did you mean client\? groups: "),
        ("methods nomethod", r"method\.name=nomethod is unknown; methods: fedit, lora_fair, "),
        ("methods lora_fare", r"did you mean lora_fair\? methods: "),
        ("export runs/x", r"lorafair export: .* required: OUT_DIR; lorafair export --help tells what is possible$"),
        ("options client server", r"lorafair options: unrecognized arguments: server; "),
    ],
)
def test_a_command_line_that_is_wrong_says_what_to_type(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    assert re.search(message, errors.strip())


def test_the_list_has_every_shipped_configuration_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed.keys() == shipped_configurations().keys()
    assert {"synthetic.yaml", "paper/domainnet_vit.yaml", "compare/methods.yaml"} <= listed.keys()
    assert listed["synthetic.yaml"].startswith("Made-up images and a tiny random ViT")


@pytest.mark.slow
def test_shipped_configurations_are_found_by_name_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_config(ROOT / "conf" / "synthetic.yaml")
    assert [load_config(name) for name in ("synthetic.yaml", "synthetic", "conf/synthetic.yaml")] == [expected] * 3
    assert load_config("paper/domainnet_vit", "data.root=/data").model.name == "vit_base_patch16_224"
    assert load_comparison("compare/methods.yaml") is not None
    assert main(["run", "synthetic.yaml", "rounds=1", "fabric.devices=1"]) == 0
    assert (tmp_path / "runs" / "synthetic" / "lora_fair-seed0" / "result.json").exists()
    Path("synthetic.yaml").write_text("rounds: 77\n")
    assert load_config("synthetic.yaml").rounds == 77, "a file that is there comes first"


@pytest.mark.slow
def test_a_finished_run_says_so_and_evaluates_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", *TINY, f"run_dir={tmp_path}"]
    assert main([*arguments, "rounds=1"]) == 0
    table = re.compile(r"^lora_fair on synthetic.*^mean [^\n]*\n", re.MULTILINE | re.DOTALL)
    (first,) = table.findall(capsys.readouterr().out)
    written = (tmp_path / "result.json").stat().st_mtime_ns

    def evaluate(*_: Any) -> None:
        raise AssertionError("it was evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(federation, "evaluate_adapters", evaluate)
        assert main([*arguments, "rounds=1"]) == 0
    said = capsys.readouterr().out
    assert "this run was finished before, with 1 round: nothing is computed again" in said
    assert table.findall(said) == [first]
    assert (tmp_path / "result.json").stat().st_mtime_ns == written
    assert main([*arguments, "rounds=2"]) == 0
    assert "continuing after round 1 of 2" in capsys.readouterr().out


def test_every_option_is_listed_and_those_of_the_methods_with_their_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    shown = capsys.readouterr().out
    assert [described.key for described in describe_options() if f"  {described.key}  (" not in shown] == []
    assert main(["methods"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in listed] == METHODS.names
    for name, about in listed:
        assert main(["methods", name]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{name}: {about}")
        keys = [described.key for described in describe_options(METHODS[name], "method.")]
        assert [key for key in keys if f"  {key}  (" not in shown] == []


def test_the_methods_of_a_plugin_are_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    assert main(["methods", "of_a_plugin", "--plugin", str(tmp_path / "mine.py")]) == 0
    METHODS.remove("of_a_plugin")
    shown = capsys.readouterr().out
    assert shown.startswith("of_a_plugin: Mine alone.\n\n  method.strength  (number) = 1\n      How much. Above 0.")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["options", "methods", "run --list"])
def test_a_reader_that_leaves_early_is_no_error(line: str) -> None:
    pipe = f"set -o pipefail; {shlex.quote(sys.executable)} -m lorafair {line} | head -n 1"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


# The documents

COMMAND = re.compile(r"(?:srun [^#]*?)?(?:\S*python train\.py|lorafair|sbatch .*\.sbatch) (?=\S)")


def commands(text: str) -> list[list[str]]:
    """The arguments of the commands in a document: of train.py, of lorafair, and what sbatch hands on to train.py.

    Commands stand in blocks of code. Not in cells of notebooks, which run when the documentation is built, nor in what
    was recorded, which is called text.
    """
    joined = text.replace("\\\n", " ")
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", joined, re.DOTALL | re.MULTILINE)
    blocks = [code for kind, code in fenced if re.fullmatch(r"(?!text)\w*", kind)]
    if not fenced or not joined.startswith("---\nfile_format: mystnb"):
        blocks += re.findall(r"^    .*", joined, re.M)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    found = [(line.removesuffix(" &"), COMMAND.match(line)) for line in lines]  # some run in the background
    return [shlex.split(line[match.end() :], comments=True) for line, match in found if match]


@pytest.mark.slow
@pytest.mark.parametrize(("document", "least"), [("README.md", 4)])
def test_the_commands_of_the_documents_are_right(
    document: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text()
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(code)  # a plug-in that a command below it names
    found = commands(text)
    assert len(found) >= least
    wrong: dict[str, str] = {}
    for arguments in found:
        try:
            parsed(arguments)
        except ConfigError as error:
            wrong[shlex.join(arguments)] = str(error)
    assert wrong == {}


def test_the_targets_of_the_readme_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used: Any = set(re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= used <= targets


# Worker processes


@pytest.mark.slow
def test_a_damaged_image_ends_the_command_and_its_workers(tmp_path: Path) -> None:
    """Only decoding finds it, in a worker process, and these ignore the signals of a scheduler."""
    root = damaged_folder(tmp_path / "pictures")
    process = start(
        [*TINY, "data.source=folder", f"data.root={root}", "data.workers=2", "model.prefix_cache=never",
         "fabric.devices=2", f"run_dir={tmp_path / 'run'}"]
    )  # fmt: skip
    status, _, errors = finish(process)
    assert status == 2
    assert len([line for line in errors.splitlines() if "cannot be decoded" in line]) == 1
    assert "Traceback" not in errors
