"""Laws of the ranks: one process needs nothing, two agree, and errors reach every rank instead of a hang."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def start(code, **env):
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env}
    code = "from distill.dist import init_ranks\nfrom distill.errors import *\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_one(code, **env):
    process = start(code, **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def run_two(code):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(code, RANK=r, LOCAL_RANK=r, **place) for r in "01"]
    results = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(err for _, err in results)
    return [out for out, _ in results]


def test_one_rank_needs_no_launcher_and_no_master_port_and_serves_deepspeed():
    out = run_one("""
        import os, torch
        ranks = init_ranks("auto")
        assert (ranks.rank, ranks.world, ranks.local_rank, ranks.device.type) == (0, 1, 0, "cpu")
        ranks.barrier()
        assert "MASTER_PORT" not in os.environ
        assert init_ranks("cpu") == ranks
        import deepspeed
        model = torch.nn.Linear(2, 1, bias=False)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": 1}})
        before = model.weight.detach().clone()
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
        torch.testing.assert_close(model.weight.detach(), before - 0.5)
        print(ranks.gather("a"), ranks.broadcast("b"), ranks.on_main(lambda: "c"))
        ranks.close()
    """)
    assert out.splitlines()[-1] == "['a'] b c"


def test_two_ranks_gather_in_rank_order_and_share_results_and_errors():
    outputs = run_two("""
        ranks = init_ranks("cpu", timeout_s=60)
        assert ranks.gather({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
        assert ranks.broadcast(f"from {ranks.rank}") == "from 0"
        assert ranks.on_main(lambda: ranks.rank + 7) == 7
        ranks.barrier()
        ranks.print("once")
        ranks.require_same("config-hash", "the config")
        for work in (lambda: 1 / 0, lambda: (_ for _ in ()).throw(StoreError("disk full", remedy="Free some.")),
                     lambda: (lambda: None)):
            try:
                ranks.on_main(work)
            except Exception as error:
                print(type(error).__name__, isinstance(error, DistillError) and error.exit_code, error)
        try:
            ranks.require_same(ranks.rank * 5, "train.lr")
        except ConfigError as error:
            print(error)
        ranks.close()
    """)
    differs = (
        "train.lr differs between ranks: rank 0 has 0, rank 1 has 5 (found 'ranks [1]'). "
        "Give every node the same files, arguments and environment."
    )
    disk = "StoreError 2 disk full. Free some."
    main, other = (out.splitlines() for out in outputs)
    assert main[:3] == ["once", "ZeroDivisionError False division by zero", disk] and main[-1] == differs
    assert other[:2] == ["DistillError 2 rank 0 failed: ZeroDivisionError: division by zero", disk]
    assert other[-1] == differs
    assert "pickle" in main[3] and "pickle" in other[2]  # a result that cannot travel is an error, not a hang


def test_a_lost_rank_is_an_error_that_names_it_not_a_hang():
    outputs = run_two("""
        import os, time
        ranks = init_ranks("cpu", timeout_s=2)
        if ranks.rank == 1:
            time.sleep(5)  # alive but never at the barrier
            os._exit(0)
        try:
            ranks.barrier()
        except DistillError as error:
            print(error, flush=True)
        os._exit(0)
    """)
    assert outputs[0].startswith("rank 0 of 2: a barrier failed")
    assert "1" in outputs[0].split("failed", 1)[1]


def test_cuda_without_a_gpu_is_a_capacity_error_with_a_remedy():
    out = run_one("""
        try:
            init_ranks("cuda")
        except CapacityError as error:
            print(error)
    """)
    assert out.startswith("hardware.device: a GPU is asked for but this machine has 0")
    assert "hardware.device: cpu" in out


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "must set all of"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must set all of"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "must set all of"),
    ],
)
def test_an_impossible_place_is_a_config_error(env, message, monkeypatch):
    from distill.dist import init_ranks
    from distill.errors import ConfigError

    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_ranks("cpu")


def test_unknown_device_is_a_config_error(monkeypatch):
    from distill.dist import init_ranks
    from distill.errors import ConfigError

    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        init_ranks("tpu")


def test_importing_the_module_loads_no_torch():
    code = "import sys, distill.dist; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_two_cpu_ranks(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import argparse\nfrom distill.dist import add_launcher_arguments, init_ranks\n"
        "p = argparse.ArgumentParser(); add_launcher_arguments(p); p.parse_args()\n"
        "r = init_ranks('cpu'); r.print('sum', sum(r.gather(r.rank + 1))); r.close()\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER} | {"PYTHONPATH": os.getcwd()}
    launcher = os.path.join(os.path.dirname(sys.executable), "deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [launcher, "--num_accelerators", "2", "--master_port", port, str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert "sum 3" in done.stdout, done.stderr
