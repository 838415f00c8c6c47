"""A CIFAR-10 of 240 images in the official layout, and runs of train.py on it."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of bits, which are a CPU's

import contextlib
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tensorboard.summary.writer import event_file_writer

import train

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pytest_configure(config: pytest.Config) -> None:
    """Each process of pytest-xdist on a core of its own: threads of two programs that share cores wait for one another.

    And pytest by itself on the first: the programs that tests start have as many threads as it has, and so the same
    last bits.
    """
    worker = getattr(config, "workerinput", {"workerid": "gw0"})["workerid"]
    starts_workers = not hasattr(config, "workerinput") and config.getoption("numprocesses", None)
    if CORES and not starts_workers:  # what they inherit would be one core for all
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})
        torch.set_num_threads(1)


# TensorBoard reads a folder's files in the order of their names, which end with a count: 9 would come after 10.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


def write_cifar10(root: Path, train_rows: int, test_rows: int) -> None:
    """Ten classes that differ in brightness and noise: learnable in a few steps, unlike for every seed."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for name, rows in [*((f"data_batch_{i}", train_rows) for i in range(1, 6)), ("test_batch", test_rows)]:
        labels = rng.permutation(np.arange(rows) % 10)
        pixels = rng.randint(0, 100, (rows, 3072)) + labels[:, None] * 15
        content = {b"data": pixels.astype(np.uint8), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"class %d" % i for i in range(10)]}))


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    write_cifar10(root, 48, 37)
    return root


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """64 training images after the split."""
    root = tmp_path_factory.mktemp("tiny")
    write_cifar10(root, 16, 10)
    return root


@pytest.fixture(autouse=True)
def as_before():
    """Each test starts without what one before it left: Accelerate's state, train.py's handlers, programs that run."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()  # torchrun then ends its processes, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def one_thread():
    """Two threads wait for each other in every small operation where another program holds a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# How the runs of the tests train, where they do not say otherwise: a network of 11,000 parameters, with SGD.
SMALL = ["--recipe", "demo", "--dataset", "cifar10", "-b", "32", "--log-every", "2"]
SMALL += ["--opt", "sgd", "--lr", "0.02", "--weight-decay", "5e-4"]
SMALL += ["--model-args", "channels=(4,4,4,16)", "k=2"]


ROOT = Path(__file__).parent.parent
STARTED: list[subprocess.Popen] = []


def start_python(processes: int, *arguments: object, cwd: Path = ROOT, stdin: int | None = None) -> subprocess.Popen:
    """python ARGUMENTS on so many processes, on the CPU and on a free port; its output is on one pipe, stdout."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, (*launch, *arguments))],
        cwd=cwd, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def start_train(cifar_dir: Path, output_dir: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    """train.py on the small CIFAR in a process of its own, or in several."""
    return start_python(processes, "train.py", *SMALL, "--data-dir", cifar_dir, "--output-dir", output_dir, *flags)


@pytest.fixture
def run_train(cifar_dir, monkeypatch, capsys):
    """run_train(output_dir, *flags): train.py's main on the small CIFAR; returns what it printed."""

    def run(output_dir: Path, *flags: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        arguments = ["train.py", *SMALL, "--data-dir", str(cifar_dir), "--output-dir", str(output_dir), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
        return capsys.readouterr().out

    return run
