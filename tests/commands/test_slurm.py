"""Batch scripts that `lorafair slurm` writes, and what sbatch is given; on no Slurm."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafair.cli import main
from lorafair.files.shipped import shipped_folder

TRAIN = Path(__file__).parents[2] / "train.py"
CARE = (
    "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@120", "srun --kill-on-bad-exit=1",
    "export SRUN_CPUS_PER_TASK=", "OMP_WAIT_POLICY=PASSIVE", "-rank%t.log", '[ "$status" -eq 75 ]',
)  # fmt: skip
TUNED = (
    "compare: {methods: [fedit, flora], seeds: [0], tune: {options: {client.learning_rate: [0.001, 0.002, 0.004]}}}\n"
)
# Writes down its arguments and environment, and gives the job ids 41, 42, ...
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >> {folder}/arguments
env > {folder}/environment
echo "$((40 + $(wc -l < {folder}/arguments)));cluster"
"""


def directives(script: str) -> list[str]:
    """The options that sbatch reads: those above the first command."""
    lines = script.splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return [shlex.split(line, comments=True)[0] for line in (at[8:] for at in lines[:first] if at[:7] == "#SBATCH")]


def command_of(script: str, **variables: str) -> list[str]:
    """What the script would have srun start, word by word, as bash reads it."""
    commands = script.partition("set -uo pipefail")[0] + "printf '%s\\0' \"${COMMAND[@]}\""
    done = subprocess.run(["bash", "-c", commands], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for text in CARE:
        assert script.count(text) == 1, text
    return script


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    assert main(["slurm", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command was called as python train.py."""
    monkeypatch.setattr(sys, "argv", [str(TRAIN)])


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a pretended sbatch writes down what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(folder=folder))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[str, ...]:
    """A comparison of 2 methods with 3 tuning runs each."""
    (tmp_path / "two.yaml").write_text(TUNED)
    return "conf/synthetic.yaml", str(tmp_path / "two.yaml"), f"run_dir={tmp_path / 'two'}"


def test_a_dry_run_prints_a_script_for_exactly_this_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    script = dry_run(
        capsys, "conf/synthetic.yaml", "fabric.num_nodes=3", "data.root=/it's $(id)", f"run_dir={run_dir}", "rounds=7",
        "--account=ours; rm -rf #x", "--cpus-per-task=6", "--mem=8G", "--qos=low", "--constraint=a&b", "--partition=p",
        "--setup=module load x && true", "--setup=export Y='1 2'", "data.source=folder",
    )  # fmt: skip
    assert directives(script) == [
        "--requeue", "--open-mode=append", "--signal=USR1@120", "--job-name=a run", "--nodes=3", "--ntasks-per-node=2",
        "--cpus-per-task=6", "--time=04:00:00", "--account=ours; rm -rf #x", "--partition=p",
        "--qos=low", "--constraint=a&b", "--mem=8G", f"--output={Path.cwd()}/slurm-%x-%j.out",
    ]  # fmt: skip
    script = script.replace("module load x", "true")
    assert command_of(script, SLURM_NTASKS_PER_NODE="2", SLURM_JOB_NUM_NODES="3") == [
        sys.executable, str(TRAIN), "run", "conf/synthetic.yaml", "fabric.num_nodes=3",
        "data.root=/it's $(id)", f"run_dir={run_dir}", "rounds=7", "data.source=folder", f"run_dir={run_dir}",
        "fabric.devices=2", "fabric.num_nodes=3",
    ]  # fmt: skip
    assert script.index("export Y='1 2'") < script.index("srun --kill")
    assert f"LOGS='{run_dir}-slurm'\n" in script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "gpus"),
    [
        (("fabric.accelerator=auto",), ["--gpus-per-node=2"]),
        (("fabric.accelerator=cuda", "fabric.devices=null"), ["--gpus-per-node=1"]),
        (("fabric.accelerator=cpu",), []),
        (("fabric.accelerator=auto", "--gpus-per-node=a100:4"), ["--gpus-per-node=a100:4"]),
    ],
)
def test_gpus_follow_the_processes_unless_given(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], gpus: list[str]
) -> None:
    found = directives(dry_run(capsys, "conf/synthetic.yaml", *arguments))
    assert [option for option in found if "gpus" in option] == gpus


@pytest.mark.parametrize(
    ("given", "directive"),
    [
        (("--time=10",), "--time=10"),
        (("--time", "10"), "--time=10"),
        (("--time=10", "--time=20"), "--time=20"),  # as with sbatch, the last one counts
    ],
)
def test_a_value_stands_behind_its_flag_or_an_equals_sign(
    capsys: pytest.CaptureFixture[str], given: tuple[str, ...], directive: str
) -> None:
    found = directives(dry_run(capsys, *given, "conf/synthetic.yaml"))
    assert [option for option in found if "time" in option] == [directive]


@pytest.mark.parametrize(
    ("main_module", "words"),
    [
        ("lorafair.__main__", [sys.executable, "-m", "lorafair"]),
        (None, [sys.executable, str(TRAIN)]),
        ("some.tool", [sys.executable, str(TRAIN)]),
    ],
)
def test_the_job_calls_the_command_as_it_was_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, main_module: str | None, words: list[str]
) -> None:
    spec = main_module and SimpleNamespace(name=main_module)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))  # type: ignore[misc]
    script = dry_run(capsys, "conf/synthetic.yaml")
    command = command_of(script, SLURM_NTASKS_PER_NODE="1", SLURM_JOB_NUM_NODES="1")
    assert command[: len(words) + 2] == [*words, "run", "conf/synthetic.yaml"]


def test_a_comparison_is_an_array_and_tunes_first(capsys: pytest.CaptureFixture[str], tuned: tuple[str, ...]) -> None:
    script = dry_run(capsys, *tuned, "--throttle=4")
    assert "--array=0-5%4" in directives(script)
    assert "sbatch --array=6-7%4 --dependency=afterany:<its id>" in script
    assert '"${COMMAND[@]}" --index "$SLURM_ARRAY_TASK_ID"' in script
    assert command_of(script)[1:4] == [str(TRAIN), "compare", tuned[0]]
    Path(tuned[1]).write_text("compare: {methods: [fedit, flora], seeds: [0, 1]}\n")
    script = dry_run(capsys, *tuned)
    assert "--array=0-3" in directives(script)
    assert "dependency" not in script


def test_submit_inherits_nothing_from_a_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sbatch: Path
) -> None:
    dropped = (
        "SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "PMI_RANK", "PMIX_RANK", "RANK",
        "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_CONFUSED",
    )  # fmt: skip
    kept = ("SLURM_CONF", "RANKING", "HOME", "PATH")
    for name in (*dropped, *kept[:2]):
        monkeypatch.setenv(name, "1")
    run_dir = tmp_path / "run"
    assert main(["slurm", "conf/synthetic.yaml", f"run_dir={run_dir}", "resume=never", "--submit"]) == 0
    found = {line.partition("=")[0] for line in (sbatch / "environment").read_text().splitlines()}
    assert not found & set(dropped)
    assert found >= set(kept)
    script = tmp_path / "run-slurm" / "job.sbatch"
    assert (sbatch / "arguments").read_text() == f"--parsable {script}\n"
    assert f"--output={script.parent}/slurm-%x-%j.out" in directives(script.read_text())
    assert not run_dir.exists()  # resume=never would refuse, or move aside, a folder with files
    out = capsys.readouterr().out
    assert "job 41" in out
    assert f"{script.parent}/run-41" in out
    assert f"tensorboard --logdir {run_dir}" in out


def test_submit_of_a_comparison_has_the_rest_wait_for_tuning(
    tmp_path: Path, tuned: tuple[str, ...], sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "new" / "mine.sbatch"
    assert main(["slurm", *tuned, f"--out={script}", "--throttle=2", "--submit"]) == 0
    assert (sbatch / "arguments").read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --array=6-7%2 --dependency=afterany:41 {script}",
    ]
    assert re.findall(r"job (\d+)", capsys.readouterr().out) == ["41", "42"]


def test_out_writes_a_file_and_submits_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sbatch: Path
) -> None:
    script = tmp_path / "job.sh"
    assert main(["slurm", "conf/synthetic.yaml", f"--out={script}"]) == 0
    assert capsys.readouterr().out == ""
    assert "COMMAND=(" in script.read_text()
    assert not (sbatch / "arguments").exists()


def test_what_sbatch_says_is_the_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sbatch: Path, tuned: tuple[str, ...]
) -> None:
    given = (*tuned, "--submit")
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no partition' >&2\necho 'sorry' >&2\nexit 1\n")
    assert fails(capsys, *given).endswith("job.sbatch: sbatch: error: no partition sorry\n")
    (sbatch / "sbatch").write_text('#!/bin/bash\n[ $# = 2 ] && echo 7 || { echo "no array" >&2; exit 1; }\n')
    assert fails(capsys, *given).endswith("no array; job 7, which tunes, is submitted\n")


def test_without_sbatch_one_line_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch cannot be run" in fails(capsys, "conf/synthetic.yaml", f"run_dir={tmp_path / 'run'}", "--submit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--acount=x",),
            "--acount=x is no option of lorafair slurm; did you mean --account? possible: --acc",
        ),
        (("--list",), "--list is no option of lorafair slurm"),
        (("--nodes=2",), "--nodes=2 is no option of lorafair slurm; options are key=value; type: fabric.num_nodes=2"),
        (("--time=",), "--time: give a value, or leave it out"),
        (("--submit=yes",), "--submit: ignored explicit argument 'yes'"),
        (("--setup=true\nrm x",), "no line breaks"),
        (("data.root=a\nb",), "no line breaks"),
        (("--throttle=2",), "--throttle=2 is for a comparison"),
        (("--throttle=0",), "--throttle: 0: give how many tasks"),
        (("run_dir=/tmp/100%j",), "Slurm would replace %"),
        (("method.name=fedits",), "fedit"),
        (("model.name=no_such_vit",), "no_such_vit"),
        (("rounds=0",), "rounds=0"),
        (("--out=/proc/none/x",), "--out=/proc/none/x"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str, sbatch: Path) -> None:
    assert message in fails(capsys, "conf/synthetic.yaml", *arguments, *["--submit"] * ("--out" not in arguments[0]))
    assert not (sbatch / "arguments").exists()


@pytest.mark.parametrize("name", ["train", "compare"])
def test_slurm_reads_every_directive_of_the_shipped_scripts(name: str) -> None:
    """Slurm ignores #SBATCH lines that stand below the first command."""
    script = (shipped_folder("slurm") / f"{name}.sbatch").read_text()
    assert len(directives(script)) == len(re.findall("^#SBATCH ", script, re.MULTILINE))
    assert "--signal=USR1@120" in directives(script)


def test_without_the_shipped_scripts_one_line_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafair.commands.slurm.shipped_folder", lambda name: tmp_path / name)
    message = f"the marked block of {tmp_path / 'slurm' / 'train.sbatch'} is filled in, and there is none"
    assert message in fails(capsys, "conf/synthetic.yaml")
