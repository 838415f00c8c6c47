"""Test what goes wrong from outside: signals, kills, damaged files, workers and disks that fail."""

import errno
import gc
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, start_python
from test_train import assert_same, load, read_rows, set_validation_losses

import train

# ------------------------------------------------------------------------------- signals and kills

@pytest.mark.parametrize("processes, send, code", [
    (1, "os.killpg(0, signal.SIGTERM)", 143),
    (1, "os.killpg(0, signal.SIGINT)", 130),
    (2, "os.kill(os.getppid(), signal.SIGTERM)", 1),  # torchrun passes it on to both groups
])  # fmt: skip
def test_a_signal_to_a_whole_group_ends_a_run_with_a_checkpoint(
    cifar_dir, run_train, tmp_path, processes, send, code
):
    """Within the ninth step, twice, as an impatient user sends it. Workers must not die of it."""
    (tmp_path / "script.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
measure_gradient = train.measure_gradient
def send_and_measure(run):
    if run.state.step == 8 and run.accelerator.is_main_process:
        for _ in range({3 - processes}):
            {send}
            time.sleep(0.5)
    return measure_gradient(run)
train.measure_gradient = send_and_measure
train.main()
""")
    flags = "--workers", "2", "--epochs", "1000"
    folders = "--data-dir", cifar_dir, "--output-dir", tmp_path / "run"
    process = start_python(processes, tmp_path / "script.py", *SMALL, *folders, *flags)
    out = process.communicate(timeout=120)[0]
    last = load(tmp_path / "run" / "last.pt")
    step = last["state"]["step"]
    assert process.returncode == code and f": saved step {step}; continue with" in out, out
    assert last["state"]["sums"][2] == 32 * (step - 6 * last["state"]["epoch"])
    if processes == 1:
        run_train(tmp_path / "whole", "--epochs", "1000", "--max-steps", "9")
        assert_same(last, load(tmp_path / "whole" / "last.pt"))

def test_a_signal_to_one_process_stops_all_and_gpus_are_seldom_asked():
    stop, other = train.StopSignal(), torch.tensor([signal.SIGTERM])
    gather = lambda mine: torch.cat([mine, other])  # noqa: E731
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    assert stop.agree(two, wait=True) == stop.agree(two, wait=False) == signal.SIGTERM
    gpus = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    assert stop.agree(gpus, wait=False) == 0

def test_a_run_killed_five_times_ends_like_one_that_was_not(cifar_dir, tmp_path, run_train):
    """Each kill comes inside a save: at a write, at a sync, between two renames."""
    flags = ["--epochs", "2", "--checkpoint-every", "1"]
    run_train(tmp_path / "whole", *flags)
    (tmp_path / "killed.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train

def run_until(call, count):
    original = getattr(os, call)
    def die(*args):
        nonlocal count
        count -= 1
        if count == 0:
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
    process = start_python(
        1, tmp_path / "killed.py", *SMALL, *folders, *flags, "--resume", "auto"
    )
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and out.count("resumed") == 5, out
    for name in ("last.pt", "best.pt"):
        assert_same(load(tmp_path / "whole" / name), load(tmp_path / "parts" / name))
    assert_same(read_rows(tmp_path / "whole"), read_rows(tmp_path / "parts"))

# ------------------------------------------------------------------------------------- checkpoints

def test_a_damaged_last_checkpoint_is_renamed_and_the_one_before_is_used(run_train, tmp_path):
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
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):  # as a scheduler starts it
        with pytest.raises(SystemExit, match=r"no whole last\.pt is left"):
            run_train(tmp_path, *flags, "--resume", "auto")
    best = str(tmp_path / "best.pt")
    assert "at step 5" in run_train(tmp_path, "--max-steps", "6", "--resume", best)

def test_weights_that_are_changed_are_refused(run_train, tmp_path):
    run_train(tmp_path / "run", "--max-steps", "3")
    checkpoint = load(tmp_path / "run" / "last.pt")
    weight = checkpoint["model"].pop("fc.weight")
    for change, message in ({}, "missing"), ({"fc.weight": weight * torch.nan}, "not finite"):
        changed = checkpoint | {"model": checkpoint["model"] | change}
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(SystemExit, match=rf"changed\.pt: .*fc\.weight is {message}"):
            run_train(tmp_path / "refused", "--resume", str(tmp_path / "changed.pt"))
    assert not (tmp_path / "refused").exists()

def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    train.write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the last one is of the folder

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

# ------------------------------------------------------------------------------- numbers and memory

def test_a_gradient_that_is_not_finite_stops_before_saving(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "measure_gradient", lambda _: torch.tensor(torch.nan))
    for _ in range(2):
        with pytest.raises(SystemExit, match="gradient is not finite at step 1"):
            run_train(tmp_path, "--checkpoint-every", "1")
        assert not (tmp_path / "last.pt").exists()
        monkeypatch.setattr(train.StopSignal, "agree", lambda *_, **__: signal.SIGTERM)

def test_a_loss_that_is_not_finite_stops_before_saving(run_train, tmp_path):
    run_train(tmp_path, "--max-steps", "6")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+: try a lower --lr"):
        run_train(tmp_path, "--resume", "auto", "--override", "--lr", "1e30")
    assert (tmp_path / "last.pt").read_bytes() == before

def test_the_first_step_that_is_not_finite_on_any_process_is_named():
    steps = [torch.tensor([1.0, 0.0, 32.0, check]) for check in (1.0, torch.nan, torch.inf)]
    for other in (0.0, torch.tensor([[0.0] * 4, [0.0] * 4, [torch.nan] * 4])):
        accelerator = SimpleNamespace(reduce=lambda values, _, other=other: values + other)
        state, pending = train.RunState(step=5), steps if other is not None else steps[:1] * 3
        run = SimpleNamespace(accelerator=accelerator, state=state, pending=pending, skipped=0)
        with pytest.raises(train.UserError, match="not finite at step 4"):
            train.settle(run)

def test_a_validation_loss_that_is_not_finite_leads_back_to_previous(
    run_train, tmp_path, monkeypatch
):
    set_validation_losses(monkeypatch, 2.0, torch.nan, torch.nan, 1.0)
    flags = "--epochs", "2", "--resume", "auto"
    for _ in range(2):  # the second time from previous.pt
        with pytest.raises(SystemExit, match="not finite after step 12: .* --resume auto"):
            run_train(tmp_path / "run", *flags)
    out = run_train(tmp_path / "run", *flags, "--override", "--lr", "0.01")
    assert "previous.pt at step 6" in out
    set_validation_losses(monkeypatch, torch.nan, 1.0)
    with pytest.raises(SystemExit, match="not finite after step 6") as error:
        run_train(tmp_path / "first", "--epochs", "1")
    assert "--resume" not in str(error.value)  # there is nothing to continue from
    run_train(tmp_path / "first", "--epochs", "1", "--lr", "0.01")

def test_skipped_steps_of_fp16_are_bounded(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(SystemExit, match="not finite"):
        run_train(tmp_path, "--epochs", "9", "--augment", "none")

def test_only_known_failures_of_the_machine_become_one_line():
    cpu = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(cpu), MemoryError()):
        assert "out of memory: lower --batch-size" in train.explain(error)
    with pytest.raises(RuntimeError, match="a mistake"):
        train.explain(RuntimeError("a mistake"))

# ------------------------------------------------------------------------------------ data workers

def exit_worker(*_) -> None:
    os._exit(1)

def raise_full(*_) -> None:
    text = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    raise RuntimeError(text)

def raise_mistake(*_) -> None:
    raise RuntimeError("a mistake")

@pytest.mark.parametrize("fault, error, message", [
    (exit_worker, SystemExit, r"train\.py: DataLoader worker .*--workers 0$"),
    (raise_full, SystemExit, r"train\.py: /dev/shm is full: .*--shm-size"),
    (raise_mistake, RuntimeError, "a mistake"),  # in the user's code, with its traceback
])  # fmt: skip
def test_a_worker_that_fails_is_explained(run_train, tmp_path, monkeypatch, fault, error, message):
    monkeypatch.setattr(torch.Tensor, "share_memory_", fault)  # only workers call it
    with pytest.raises(error, match=message):
        run_train(tmp_path, "--workers", "2")
    gc.collect()
    assert not multiprocessing.active_children()

@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_a_worker_that_cannot_start_ends_a_program_at_once(run_train, cifar_dir, tmp_path, program):
    run_train(tmp_path, "--max-steps", "1")
    code = """
import errno, os, runpy, sys
fork, calls = os.fork, iter(range(9))
def fail_third():
    if next(calls) == 2:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    return fork()
os.fork, sys.argv = fail_third, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    flags = ["--data-dir", cifar_dir, "--workers", "4"]
    more = {"train.py": [*SMALL, "--output-dir", tmp_path / "b"], "evaluate.py": [tmp_path / "best.pt"]}
    process = start_python(1, "-c", code, program, *more[program], *flags)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and f"\n{program}: " in f"\n{out}" and "Traceback" not in out, out

# --------------------------------------------------------------------------- folders and processes

def test_a_folder_in_use_or_in_a_file_is_refused(run_train, tmp_path):
    code = "import pathlib, train; lock = train.lock_folder(pathlib.Path('.')); print('held'); input()"
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    other = start_python(1, "-c", path + code, cwd=tmp_path, stdin=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match="in use by another run"):
        run_train(tmp_path)
    other.kill()
    other.wait()
    run_train(tmp_path, "--max-steps", "1")
    with pytest.raises(SystemExit, match=r"train\.py: .*args\.json"):
        run_train(tmp_path / "args.json" / "run")

@pytest.mark.parametrize("missing", ["fcntl", "locks", "sync"])
def test_a_simple_file_system_is_enough(run_train, tmp_path, monkeypatch, missing):
    fsync = os.fsync

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def sync_files(file):
        refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file)

    if missing == "fcntl":  # on Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    elif missing == "locks":
        monkeypatch.setattr("fcntl.lockf", refuse)
    else:
        monkeypatch.setattr(os, "fsync", sync_files)
    out = run_train(tmp_path, "--max-steps", "1")
    assert load(tmp_path / "last.pt")["state"]["step"] == 1
    assert ("cannot be locked" in out) == (missing != "sync")
    numbers = []
    for _ in range(2):
        train.write_atomic(tmp_path / "file", b"content")
        numbers.append(os.open(tmp_path, os.O_RDONLY))  # the lowest that is free
        os.close(numbers[-1])
    assert numbers[0] == numbers[1]  # no file stays open

def test_two_machines_agree_on_checkpoint_and_data(run_train, cifar_dir, tiny_dir, tmp_path):
    """Each has its own folders: both continue from the main one's, and other data is refused."""
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
os.chdir("machine" + os.environ["RANK"])
train.main()
""")
    machines = tmp_path / "machine0", tmp_path / "machine1"
    for machine, step in zip(machines, ("5", "2")):
        run_train(machine / "out", "--max-steps", step)
        (machine / "data").symlink_to(cifar_dir)
    before = (machines[1] / "out" / "last.pt").read_bytes()
    flags = *SMALL, "--data-dir", "data", "--max-steps", "8", "--resume", "auto", "--output-dir"
    process = start_python(2, "script.py", *flags, "out", cwd=tmp_path)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed out/last.pt at step 5" in out, out
    assert load(machines[0] / "out" / "last.pt")["state"]["step"] == 8
    assert (machines[1] / "out" / "last.pt").read_bytes() == before
    (machines[1] / "data").unlink()
    (machines[1] / "data").symlink_to(tiny_dir)
    process = start_python(2, "script.py", *flags, "new", cwd=tmp_path)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "train.py: the processes have different" in out, out
    assert not (machines[0] / "new").exists()
