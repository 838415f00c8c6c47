"""A CIFAR-10 of 240 images in the official layout, and runs of train.py on it."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare bits, which differ between devices

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

ROOT = Path(__file__).parent.parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
STARTED: list[subprocess.Popen] = []

# The runs of the tests train a network of 11,000 parameters with SGD, unless they say otherwise.
SMALL = ["--recipe", "demo", "--dataset", "cifar10", "-b", "32", "--log-every", "2"]
SMALL += ["--mixed-precision", "no"]
SMALL += ["--opt", "sgd", "--lr", "0.02", "--weight-decay", "5e-4"]
SMALL += ["--model-args", "channels=(4,4,4,16)", "k=2"]

# TensorBoard reads files in the order of their names, which end with a count; 9 sorts after 10.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

def pytest_configure(config: pytest.Config) -> None:
    """Put each process of pytest-xdist on its own core, because threads that share a core wait for
    one another. Programs that tests start inherit it, and so compute the same last bits."""
    worker = getattr(config, "workerinput", {"workerid": "gw0"})["workerid"]
    if CORES and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})
        torch.set_num_threads(1)

def write_cifar10(root: Path, train_rows: int, test_rows: int) -> None:
    """Write ten classes that differ in brightness, so that a few steps can learn them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.RandomState(0)
    batches = [(f"data_batch_{i}", train_rows) for i in range(1, 6)] + [("test_batch", test_rows)]
    for name, rows in batches:
        labels = rng.permutation(np.arange(rows) % 10)
        pixels = rng.randint(0, 100, (rows, 3072)) + labels[:, None] * 15
        content = {b"data": pixels.astype(np.uint8), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"label_names": [b"class %d" % i for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))

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
    """Remove what a test leaves: Accelerate's state, train.py's handlers, running programs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()  # torchrun then ends its processes, which have their own sessions
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def start_python(processes: int, *arguments: object, cwd: Path = ROOT, stdin: int | None = None):
    """Start python ARGUMENTS in one or more processes on the CPU; stdout has all their output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [*torchrun, *arguments] if processes > 1 else arguments
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment, stdin=stdin,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process

def start_train(cifar_dir: Path, output_dir: Path, *flags: str, processes: int = 1):
    """Start train.py on the small CIFAR in one process or more of its own."""
    folders = "--data-dir", cifar_dir, "--output-dir", output_dir
    return start_python(processes, "train.py", *SMALL, *folders, *flags)

@pytest.fixture
def run_train(cifar_dir, monkeypatch, capsys):
    """Return run(output_dir, *flags), which calls train.main and returns what it printed."""

    def run(output_dir: Path, *flags: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        folders = "--data-dir", str(cifar_dir), "--output-dir", str(output_dir)
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *folders, *flags])
        train.main()
        return capsys.readouterr().out

    return run
