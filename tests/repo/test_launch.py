"""The hostfile and the Slurm script that configs/README.md tells to use, as far as one machine can try them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.config import load_config

ROOT = Path(__file__).resolve().parents[2]
HOSTFILE, SCRIPT = ROOT / "configs" / "hostfile.example", ROOT / "configs" / "slurm.sbatch"
README = (ROOT / "configs" / "README.md").read_text()

# Stand-ins for Slurm's commands: srun starts SLURM_NTASKS processes here, and hands SIGTERM on to them.
SRUN = r"""#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$RECORD"; shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
    while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
    wait "$task" || status=$?
    ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = r"""#!/bin/bash
if [[ $1 == show ]]; then printf 'node%s\n' 1 2; else echo "scontrol $*" >> "$RECORD"; fi
"""
# In the program's place: tells its rank and arguments, then ends with END, or waits for SIGTERM and ends with 0.
TASK = r"""#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT, $OMP_NUM_THREADS: $*" >> "$RECORD"
[[ $END ]] && exit "$END"
trap 'sleep 0.3; exit 0' TERM
while :; do sleep 0.02; done
"""


def launcher(*arguments: str):
    """What DeepSpeed's own parsers make of a command line: (its options, {host: slots})."""
    from deepspeed.launcher import runner

    args = runner.parse_args(list(arguments))
    return args, runner.fetch_hostfile(args.hostfile)


def test_deepspeed_reads_the_hostfile_and_takes_all_its_gpus():
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    args, pool = launcher("--hostfile", str(HOSTFILE), "distill/run.py", "--config", "configs/qwen32b.yaml")
    config = load_config(ROOT / "configs" / "qwen32b.yaml")
    assert pool == {f"node{i}": 8 for i in range(1, 5)} and sum(pool.values()) == config.hardware.gpus
    active = parse_inclusion_exclusion(pool, args.include, args.exclude)
    assert list(active) == list(pool) and all(gpus == list(range(8)) for gpus in active.values())
    assert args.user_script == "distill/run.py" and args.user_args == ["--config", "configs/qwen32b.yaml"]


COMMANDS = re.findall(r"^    (deepspeed .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_deepspeed_reads_every_launch_of_the_readme(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, _ = launcher(*command.split()[1:])
    assert (ROOT / args.user_script).is_file()
    config = args.user_args[args.user_args.index("--config") + 1]
    changes = [args.user_args[i + 1] for i, word in enumerate(args.user_args) if word == "--set"]
    load_config(config, changes)
    if args.no_ssh:
        assert args.node_rank == 0 and args.master_addr == "node1" and args.master_port == 29500


def test_the_readme_shows_both_ways_of_a_hostfile_and_the_service():
    assert len(COMMANDS) >= 5 and sum("--no_ssh" in each for each in COMMANDS) == 1
    assert any("teachers/serve.py" in each for each in COMMANDS)


@pytest.fixture
def slurm(tmp_path):
    """The environment of the job script, with the stand-ins first in PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("task", TASK)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "record").touch()
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "12"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "END": "0"}
    return {**os.environ, **job, **own, "PYTHON": str(tmp_path / "task")}


def recorded(environment: dict) -> list[str]:
    return sorted(Path(environment["RECORD"]).read_text().splitlines())


def submit(environment: dict, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=ROOT, env=environment)


def test_the_job_script_is_valid_and_asks_for_what_it_uses():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "requeue" in asked
    assert asked["signal"].startswith("B:TERM@")
    for nodes, config in re.findall(r"sbatch --nodes=(\d+) configs/slurm.sbatch --config (\S+)", README):
        assert load_config(ROOT / config).hardware.gpus == int(nodes) * int(asked["gpus-per-node"])


def test_every_task_gets_its_place_and_the_arguments(slurm):
    assert submit(slurm, "--config", "a b.yaml", "--set", "x=1").wait(60) == 0
    told = "12: distill/run.py --config a b.yaml --set x=1"
    places = [f"rank {i} of 3, local {i}, at node1:24711, {told}" for i in range(3)]
    assert recorded(slurm) == [*places, "srun --kill-on-bad-exit=1"]


def test_a_job_that_fails_ends_with_its_status_and_is_not_run_again(slurm):
    assert submit({**slurm, "END": "3"}).wait(60) == 3
    assert not any("requeue" in line for line in recorded(slurm))


def test_a_job_that_is_told_to_stop_stops_its_tasks_and_goes_back_into_the_queue(slurm):
    job = submit({**slurm, "END": ""})
    while len([line for line in recorded(slurm) if line.startswith("rank")]) < 3:
        assert job.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert "scontrol requeue 4711" in recorded(slurm)


def test_the_job_script_starts_the_program_itself(slurm):
    """The plan of the smallest config, by one task of the real program."""
    environment = {**slurm, "SLURM_NTASKS": "1", "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "--config", "configs/demo.yaml", "--plan"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Everything fits." in done.stdout, done.stderr
