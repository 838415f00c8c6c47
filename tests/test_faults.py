"""Test what goes wrong from outside: signals, kills, damaged files, workers and disks that fail."""

import errno
import gc
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, start_python
from test_train import assert_same, load, read_rows, set_validation_losses

import evaluate
import train

@pytest.mark.parametrize("processes, number, code", [(1, 15, 143), (1, 2, 130), (2, 15, 1)])
def test_a_signal_to_the_group_saves(cifar_dir, run_train, tmp_path, processes, number, code):
    """Workers must not die of it. It comes inside a step, and torchrun hands it on."""
    (tmp_path / "script.py").write_text("""
import time, train
measure_gradient = train.measure_gradient
def measure_slowly(run):
    if run.state.step == 7:
        run.accelerator.print("now", flush=True)
        time.sleep(2)
    return measure_gradient(run)
train.measure_gradient = measure_slowly
train.main()
""")
    flags = "--workers", "2", "--epochs", "1000", "--output-dir", tmp_path / "run"
    arguments = tmp_path / "script.py", *SMALL, "--data-dir", cifar_dir, *flags
    process = start_python(processes, *arguments)
    while (line := process.stdout.readline()) != "now\n":
        assert line, "ended too early"
    for _ in range(3 - processes):  # an impatient user sends it twice
        os.killpg(process.pid, number)
    out, name = process.communicate(timeout=60)[0], signal.Signals(number).name
    assert process.returncode == code and f"{name}: saved step 8; continue with" in out, out
    assert load(tmp_path / "run" / "last.pt")["state"]["sums"][2] == 2 * 32  # of the second epoch
    if processes == 1:
        run_train(tmp_path / "whole", "--epochs", "1000", "--max-steps", "8")
        assert_same(*(load(tmp_path / name / "last.pt") for name in ("run", "whole")))

def test_a_signal_to_the_group_spares_workers_that_start(cifar_dir, tmp_path):
    """PyTorch gives workers a handler that lets SIGTERM kill them, before they can ignore it."""
    (tmp_path / "script.py").write_text("""
import os, signal, train
from torch.utils.data._utils import signal_handling
set_handlers = signal_handling._set_worker_signal_handlers
def set_handlers_and_signal():
    set_handlers()
    os.killpg(os.getpgid(os.getppid()), signal.SIGTERM)
signal_handling._set_worker_signal_handlers = set_handlers_and_signal
train.main()
""")
    flags = "--workers", "1", "--output-dir", tmp_path / "run"
    process = start_python(1, tmp_path / "script.py", *SMALL, "--data-dir", cifar_dir, *flags)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "SIGTERM: saved step 1; continue with" in out, out

def test_a_signal_to_one_process_stops_all_after_their_step():
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=lambda own: own + 15)
    assert train.StopSignal().agree(two, wait=True) == signal.SIGTERM
    assert train.StopSignal().agree(two, wait=False) == signal.SIGTERM

def test_a_run_killed_five_times_ends_like_one_that_was_not(cifar_dir, tmp_path, run_train):
    """Each kill comes inside a save: at a write, at a sync, between two renames."""
    flags = ["--epochs", "2", "--checkpoint-every", "1"]
    run_train(tmp_path / "whole", *flags)
    (tmp_path / "killed.py").write_text("""
import itertools, os, signal, train
def run_until(call, count):
    original, calls = getattr(os, call), itertools.count(1)
    def die(*args):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(os, call, die)
    train.main()
for kill in (("replace", 4), ("fsync", 7), ("replace", 5), ("fsync", 6), ("replace", 6)):
    child = os.fork()
    if child == 0:
        run_until(*kill)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, kill
train.main()
""")
    folders = "--data-dir", cifar_dir, "--output-dir", tmp_path / "parts"
    arguments = tmp_path / "killed.py", *SMALL, *folders, *flags, "--resume", "auto"
    process = start_python(1, *arguments)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and out.count("resumed") == 5, out
    for name in ("last.pt", "best.pt"):
        assert_same(load(tmp_path / "whole" / name), load(tmp_path / "parts" / name))
    assert_same(read_rows(tmp_path / "whole"), read_rows(tmp_path / "parts"))

def test_a_damaged_checkpoint_is_renamed_and_the_one_before_is_used(run_train, tmp_path):
    flags = "--max-steps", "5", "--checkpoint-every", "2"
    run_train(tmp_path, *flags)
    last = tmp_path / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    out = run_train(tmp_path, *flags, "--resume", "auto")
    assert "last.pt: damaged" in out and "previous.pt at step 4" in out
    assert (tmp_path / "last.pt.damaged").read_bytes() == content
    assert load(last)["state"]["step"] == 5
    last.rename(tmp_path / "copy.pt")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no whole last\.pt is left"):
        run_train(tmp_path, *flags, "--resume", "auto")
    flags = "--max-steps", "6", "--resume", str(tmp_path / "copy.pt")
    assert "at step 5" in run_train(tmp_path, *flags)

def test_a_write_that_the_kernel_refuses_leaves_the_checkpoint(run_train, tmp_path):
    """A file may not grow beyond half a checkpoint."""
    run_train(tmp_path, "--max-steps", "2")
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"last\.pt: File too large; .* are intact$"):
            run_train(tmp_path, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))

def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    train.write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]

def test_locks_are_not_required(run_train, tmp_path, monkeypatch):
    refuse = Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    for module in (None, SimpleNamespace(lockf=refuse, LOCK_EX=2, LOCK_NB=4)):  # None: Windows
        monkeypatch.setitem(sys.modules, "fcntl", module)
        assert "cannot be locked" in run_train(tmp_path, "--resume", "auto", "--max-steps", "1")
    assert load(tmp_path / "last.pt")["state"]["step"] == 1

def test_a_folder_in_use_is_refused(run_train, tmp_path):
    code = "import train; lock = train.lock_folder(train.Path('.')); print('held'); input()"
    other = start_python(1, "-c", code, cwd=tmp_path, stdin=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match="in use by another run"):
        run_train(tmp_path)
    other.kill()
    other.wait()
    run_train(tmp_path, "--max-steps", "1")

def test_numbers_that_are_not_finite_are_not_saved(run_train, tmp_path, monkeypatch):
    run_train(tmp_path, "--max-steps", "2")
    before = (tmp_path / "last.pt").read_bytes()
    flags = "--resume", "auto", "--override", "--checkpoint-every"
    with pytest.raises(SystemExit, match=r"not finite at step \d+: try a lower --lr"):
        run_train(tmp_path, *flags, "9", "--lr", "1e18")
    monkeypatch.setattr(train, "measure_gradient", lambda _: torch.tensor(torch.nan))
    for _ in range(2):
        with pytest.raises(SystemExit, match="gradient is not finite at step 3"):
            run_train(tmp_path, *flags, "1")
        monkeypatch.setattr(train.StopSignal, "agree", lambda *_: signal.SIGTERM)
    assert (tmp_path / "last.pt").read_bytes() == before

def test_the_first_step_that_is_not_finite_on_any_process_is_named():
    other = torch.tensor([[1.0] * 4, [torch.nan] * 4, [torch.nan] * 4])
    accelerator = SimpleNamespace(reduce=lambda values, _: values + other)
    run = SimpleNamespace(accelerator=accelerator, pending=[*torch.ones(3, 4)])
    run.state = train.RunState(step=5)  # after steps 3, 4 and 5
    with pytest.raises(train.UserError, match="not finite at step 4"):
        train.settle(run)

def test_a_validation_loss_that_is_not_finite_leads_back(run_train, tmp_path, monkeypatch):
    set_validation_losses(monkeypatch, 2.0, torch.nan, torch.nan, 1.0)
    for _ in range(2):  # the second time from previous.pt
        with pytest.raises(SystemExit, match=r"step 12 is not finite: .* --resume auto"):
            run_train(tmp_path, "--epochs", "2", "--resume", "auto")
    flags = "--epochs", "2", "--override", "--lr", "0.01", "--resume", "auto"
    assert "previous.pt at step 6" in run_train(tmp_path, *flags)

def test_out_of_memory_and_a_lost_process_are_explained():
    for error in (torch.OutOfMemoryError(), MemoryError(), RuntimeError("can't allocate memory")):
        assert "out of memory: lower --batch-size" in train.explain(error)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer.")
    assert "another process of the run ended" in train.explain(error)

@pytest.mark.parametrize("fault, error, message", [
    ("", SystemExit, r"train\.py: a data worker was killed.*--workers 0$"),  # it dies
    ("unable to allocate shared memory(shm): No space left on device (28)", SystemExit, "shm-size"),
    ("a mistake in the data", RuntimeError, "a mistake"),  # with its traceback
])  # fmt: skip
def test_a_worker_that_fails_is_explained(run_train, tmp_path, monkeypatch, fault, error, message):
    def fail(_):
        if not fault:
            os._exit(1)
        raise RuntimeError(fault)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # only workers call it
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # to end soon
    with pytest.raises(error, match=message):
        run_train(tmp_path, "--workers", "2")
    gc.collect()
    assert not multiprocessing.active_children()

def test_a_worker_that_dies_while_it_sends_is_explained(run_train, tmp_path, monkeypatch):
    def accept_and_die(sharer):
        sharer._listener.accept()
        os._exit(1)

    # Only workers send: the main process asks this thread of theirs for each batch's memory.
    monkeypatch.setattr("multiprocessing.resource_sharer._ResourceSharer._serve", accept_and_die)
    with pytest.raises(SystemExit, match=r"train\.py: .*worker .*--workers 0$"):
        run_train(tmp_path, "--workers", "2")

def test_a_worker_that_cannot_start_ends_a_program(run_train, tmp_path, monkeypatch):
    run_train(tmp_path, "--max-steps", "1")
    fork, works = os.fork, itertools.cycle([True, False])

    def fork_first():
        if next(works):
            return fork()
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork_first)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(SystemExit, match=r"^train\.py: .*memory"):
        run_train(tmp_path / "new", "--workers", "2")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "last.pt"), "--workers", "2"])
    with pytest.raises(SystemExit, match=r"^evaluate\.py: .*memory"):
        evaluate.main()
    for child in multiprocessing.active_children():
        child.terminate()  # as Python does when it ends
        child.join(9)
    assert not multiprocessing.active_children()

def test_two_machines_agree_on_checkpoint_and_data(run_train, cifar_dir, tiny_dir, tmp_path):
    """Each has its own folders: both continue from the main one's, and other data is refused."""
    (tmp_path / "script.py").write_text("""
import os, train
os.chdir("machine" + os.environ["RANK"])
train.main()
""")
    main, other = tmp_path / "machine0", tmp_path / "machine1"
    for machine, step, data_dir in ((main, "5", cifar_dir), (other, "2", tiny_dir)):
        run_train(machine / "out", "--max-steps", step)
        (machine / "data").symlink_to(data_dir)
    before = (other / "out" / "last.pt").read_bytes()

    def run(folder, data_dir):
        flags = "--output-dir", folder, "--data-dir", data_dir, "--max-steps", "8"
        arguments = "script.py", *SMALL, *flags, "--resume", "auto"
        process = start_python(2, *arguments, cwd=tmp_path)
        return process.communicate(timeout=120)[0], process.returncode

    out, code = run("out", cifar_dir)
    assert code == 0 and "resumed out/last.pt at step 5" in out, out
    assert load(main / "out" / "last.pt")["state"]["step"] == 8
    assert (other / "out" / "last.pt").read_bytes() == before
    out, code = run("new", "data")
    assert code == 1 and "train.py: the processes have different" in out, out
    assert not (main / "new").exists()
