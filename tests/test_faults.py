"""What goes wrong from outside: signals, kills, damaged and foreign files, a directory in use, a machine that fails."""

import gc
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from conftest import ROOT, SMALL, start_python, start_train
from test_train import assert_same, load, outcome

import train


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_a_checkpoint(cifar_dir, tmp_path, number, code):
    process = start_train(cifar_dir, tmp_path / "run", "--epochs", "1000")
    wait_for(process, "steps an epoch")
    time.sleep(0.5)
    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    out = process.communicate(timeout=10)[0]
    assert process.returncode == code and "Traceback" not in out
    step = load(tmp_path / "run" / "last.pt")["state"]["step"]
    go_on = f"go on with the same command and --output-dir {tmp_path}/run --resume auto"
    assert f"{number.name}: saved step {step}; {go_on}" in out and step > 0


def test_two_processes_stop_at_the_same_step(cifar_dir, tmp_path):
    process = start_train(cifar_dir, tmp_path / "run", "--epochs", "1000", processes=2)
    wait_for(process, "steps an epoch")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=30)[0]
    state = load(tmp_path / "run" / "last.pt")["state"]
    assert f"SIGTERM: saved step {state['step']}" in out
    done = state["step"] - 6 * state["epoch"]
    assert [sums[2] for sums in state["sums"]] == [16 * done, 16 * done]  # images that each process has seen


def test_a_signal_to_one_process_stops_all_and_gpus_are_seldom_asked():
    stop, other = train.StopSignal(), torch.tensor([signal.SIGTERM])
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=lambda mine: torch.cat([mine, other]))
    assert stop.agreed(two) == stop.agreed(two, wait=False) == signal.SIGTERM
    assert stop.agreed(SimpleNamespace(num_processes=2, device=torch.device("cuda")), wait=False) == 0


def test_a_signal_saves_nothing_that_is_not_finite(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    monkeypatch.setattr(train.StopSignal, "agreed", lambda *_: signal.SIGTERM)
    with pytest.raises(SystemExit, match="its gradient is not finite at step 1"):
        run_train(tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_run_killed_five_times_ends_as_one_that_was_not(cifar_dir, tmp_path, run_train):
    """Each time inside a save: at a write, at a sync, between two renames. The process is gone there and then."""
    flags = ["--epochs", "2", "--checkpoint-every", "1"]
    run_train(tmp_path / "whole", *flags)
    (tmp_path / "killed.py").write_text("""
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train

def run_until(call, count):
    original = getattr(os, call)
    def dying(*args):
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(os, call, dying)
    train.main()

for kill in (("replace", 4), ("fsync", 7), ("replace", 5), ("fsync", 6), ("replace", 6)):
    time.sleep(1 - time.time() % 1)  # TensorBoard reads files in the order of the seconds in which they begin
    child = os.fork()
    if child == 0:
        try:
            run_until(*kill)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, kill
time.sleep(1 - time.time() % 1)
train.main()
""")
    arguments = [*SMALL, "--data-dir", cifar_dir, "--output-dir", tmp_path / "parts", *flags, "--resume", "auto"]
    process = start_python(1, "killed.py", ROOT, *arguments, cwd=tmp_path)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and out.count("resumed") == 5, out
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


def test_resume_auto_passes_over_a_damaged_checkpoint(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "2", "--max-steps", "5", "--checkpoint-every", "2")
    last, previous = tmp_path / "run" / "last.pt", tmp_path / "run" / "previous.pt"
    assert load(last)["state"]["step"] == 5 and load(previous)["state"]["step"] == 4
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    out = run_train(tmp_path / "run", "--epochs", "2", "--resume", "auto", "--max-steps", "5")
    assert "left aside" in out and "last.pt: damaged" in out and "previous.pt at step 4" in out
    for path in (tmp_path / "run").glob("*.pt"):
        path.write_bytes(b"")
    for _ in range(2):  # as a scheduler starts it
        with pytest.raises(SystemExit, match=r"no whole last\.pt is left"):
            run_train(tmp_path / "run", "--epochs", "2", "--resume", "auto")


def test_a_changed_checkpoint_is_refused(run_train, tmp_path, monkeypatch):
    flags = ("--epochs", "2", "--max-steps", "3")
    run_train(tmp_path / "run", *flags)
    trained, changed = tmp_path / "run" / "last.pt", tmp_path / "changed.pt"
    assert "at step 3" in run_train(tmp_path / "whole", *flags, "--resume", str(trained))
    for change in (
        lambda c: c["model"].update({"fc.weight": c["model"]["fc.weight"] * torch.nan}),
        lambda c: c["model"].pop("fc.weight"),
        lambda c: c["state"].update(step=-1),
        lambda c: c["state"].update(step="five"),
        lambda c: c["state"].pop("sums"),
        lambda c: c["state"].update(other=1),
        lambda c: c["state"].update(sums=[[0.0, 0.0, 0.0]]),
        lambda c: c["state"].update(sums=[]),
        lambda c: c["state"].update(epoch=5),
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
        lambda c: c["optimizer"].update(param_groups=[]),
        lambda c: c.update(optimizer=None),
    ):
        checkpoint = load(trained)
        change(checkpoint)
        torch.save(checkpoint, changed)
        with pytest.raises(SystemExit, match=r"train.py: \S*changed.pt: [^\n]*$"):
            run_train(tmp_path / "refused", *flags, "--resume", str(changed))
    monkeypatch.setattr(train, "load_state", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(SystemExit, match=r"^train\.py: out of memory: try "):  # whose fault is not the checkpoint's
        run_train(tmp_path / "refused", *flags, "--resume", str(trained))


def test_what_max_steps_left_as_the_best_goes_on(run_train, tmp_path):
    """The best of an epoch that is not done, where last.pt was damaged."""
    run_train(tmp_path / "whole", "--epochs", "2")
    run_train(tmp_path / "run", "--epochs", "2", "--max-steps", "4")  # of 6 steps an epoch
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"or --resume \S+/best\.pt$"):
        run_train(tmp_path / "run", "--epochs", "2", "--resume", "auto")
    out = run_train(tmp_path / "run", "--epochs", "2", "--resume", str(tmp_path / "run" / "best.pt"))
    assert "at step 4, epoch 1" in out
    whole, run = (load(tmp_path / name / "last.pt") for name in ("whole", "run"))
    assert_same(whole, run)


def test_without_a_stderr_there_is_no_bar_to_draw(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    run_train(tmp_path / "run", "--epochs", "1", "--max-steps", "2")
    assert load(tmp_path / "run" / "last.pt")["state"]["step"] == 2


def test_what_accelerate_cannot_do_is_one_line(run_train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit, match=r"^train\.py: .*fp8"):
        run_train(tmp_path / "run")


def test_a_second_signal_while_the_program_ends_is_no_traceback():
    code = (
        "import atexit, os, signal, train; kill = lambda number: os.kill(os.getpid(), number); "
        "train.StopSignal().listen(); "
        "atexit.register(kill, signal.SIGTERM); kill(signal.SIGINT)"
    )
    process = start_python(1, "-c", code)
    assert process.communicate(timeout=300)[0] == "" and process.returncode == 0


def test_a_directory_in_use_is_refused(run_train, tmp_path):
    code = "import pathlib, sys, train; lock = train.lock_output_dir(pathlib.Path(sys.argv[1])); print('held'); input()"
    other = start_python(1, "-c", code, tmp_path, stdin=subprocess.PIPE)
    wait_for(other, "held")
    with pytest.raises(SystemExit, match="in use by another run"):
        run_train(tmp_path, "--epochs", "1")
    other.kill()
    other.wait()
    run_train(tmp_path, "--epochs", "1", "--max-steps", "1")


def test_a_write_that_the_kernel_refuses_is_one_line_and_leaves_the_checkpoint(run_train, tiny_dir, tmp_path):
    """A file may not grow beyond half a checkpoint."""
    flags = ("-b", "16", "--data-dir", str(tiny_dir), "--epochs", "2")
    run_train(tmp_path / "run", *flags, "--max-steps", "2")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"^train.py: .*File too large: '\S*\.pt'.*--resume auto\.$"):
            run_train(tmp_path / "run", *flags, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_curves_that_cannot_be_written_end_a_run_with_one_line(run_train, tiny_dir, tmp_path):
    """TensorBoard's thread finds it out. No file may grow beyond what a fresh event file has after some points."""
    flags = "-b", "4", "--data-dir", str(tiny_dir), "--epochs", "99", "--log-every", "1"  # 16 steps an epoch
    run_train(tmp_path / "run", *flags, "--max-steps", "1")
    command = [sys.executable, "train.py", *SMALL, *flags, "--output-dir", str(tmp_path / "run"), "--resume", "auto"]
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
    limited += "os.execv(sys.argv[1], sys.argv[1:])"
    process = start_python(1, "-c", limited, *command)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "Traceback" not in out
    assert re.search(r"^train\.py: .*File too large[^']*--resume auto\.$", out, re.M), out  # of no 'last.pt'


def test_a_directory_that_cannot_be_written_is_found_before_training(run_train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^train.py: .*file"):
        run_train(tmp_path / "file" / "run")


def test_a_worker_that_dies_is_named_and_leaves_no_orphan(run_train, tmp_path, monkeypatch):
    whole = train.datasets.ImageSet.__getitems__

    def die(self, indices):
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return whole(self, indices)  # for TensorBoard's grid of images
        if worker.id == 1:
            os._exit(1)
        time.sleep(1)

    monkeypatch.setattr(train.datasets.ImageSet, "__getitems__", die)
    monkeypatch.setattr(train.datasets, "load_data", lambda *args: small_data())
    with pytest.raises(SystemExit, match=r"^train.py: DataLoader worker .*: start again, .*--workers 0$"):
        run_train(tmp_path / "run", "--epochs", "1", "--workers", "2")
    gc.collect()
    assert not multiprocessing.active_children()


def test_workers_never_get_a_signal_to_the_group(run_train, tiny_dir, tmp_path, monkeypatch):
    """From their first moment on, in training and in the evaluation."""
    read = train.datasets.ImageSet.__getitems__

    def signalled(self, indices):
        if torch.utils.data.get_worker_info():
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            (tmp_path / f"a worker of {len(self)} images").touch()
        return read(self, indices)

    monkeypatch.setattr(train.datasets.ImageSet, "__getitems__", signalled)
    run_train(tmp_path / "run", "-b", "16", "--data-dir", str(tiny_dir), "--epochs", "1", "--workers", "2")
    assert len(list(tmp_path.glob("a worker of * images"))) == 2  # of the training set and of the validation set


def small_data() -> train.datasets.Data:
    images = train.datasets.ImageSet(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.arange(64) % 10)
    names = tuple(f"class {i}" for i in range(10))
    return train.datasets.Data(images, images, images, names, (0.5,) * 3, (0.25,) * 3)


def test_out_of_memory_says_what_to_do(tmp_path):
    args = train.parse_args(["--output-dir", str(tmp_path)])
    assert train.go_on(args) == "start again"
    (tmp_path / "last.pt").touch()
    cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
    old = "[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(cpu), RuntimeError(old), MemoryError()):
        line = train.explain(error, *train.advice(args, 1))
        assert "out of memory" in line and "--grad-accum-steps 2" in line and "--batch-size 128" in line
    compiler = torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\nmore")
    assert "--compile failed (InvalidCxxCompiler: No working C++ compiler found): " in train.explain(compiler, "", "")
    gone = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
    line = train.explain(gone, *train.advice(args, 1))
    again = f"go on with the same command and --output-dir {tmp_path} --resume auto"
    assert re.match(rf"another process is gone \(.*\): {again}$", line)
    nccl = torch.distributed.DistBackendError("NCCL error in: a.cpp:9, invalid usage\nLast error:\nDuplicate GPU")
    assert "invalid usage Last error: Duplicate GPU): go on" in train.explain(nccl, *train.advice(args, 1))
    with pytest.raises(RuntimeError, match="anything else"):
        train.explain(RuntimeError("anything else"), *train.advice(args, 1))


@pytest.mark.parametrize(
    ("batch_size", "parts", "processes", "more", "smaller"),
    [(256, 1, 1, 2, 128), (100, 4, 1, 5, 48), (36, 1, 2, 2, 18), (14, 1, 2, None, 6), (4, 1, 2, None, None)],
)
def test_what_would_need_less_memory_is_no_bad_argument(monkeypatch, batch_size, parts, processes, more, smaller):
    monkeypatch.setattr(train, "check_processes", lambda _: None)
    flags = ["-b", str(batch_size), "--grad-accum-steps", str(parts)]
    ways = ["--checkpoint-activations"]
    if more:
        ways.append(f"--grad-accum-steps {more} (with --override, to go on)")
    if smaller:
        ways.append(f"--batch-size {smaller} in a new run")
    assert train.advice(train.parse_args(flags), processes)[0] == ", or ".join(ways)
    for way in ways[1:]:
        args = train.parse_args([*flags, *way.split()[:2]])
        train.check_args(args, SimpleNamespace(num_processes=processes, device=torch.device("cpu")))


def test_a_gradient_that_is_not_finite_stops_before_saving(run_train, tmp_path, monkeypatch):
    """The loss is finite, its gradient is not: the weights would be lost at the next save."""
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(torch.nan))
    with pytest.raises(SystemExit, match="its gradient is not finite at step 1"):
        run_train(tmp_path / "run", "--epochs", "1", "--checkpoint-every", "1")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_skipped_steps_of_fp16_are_bounded(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(SystemExit, match="21 steps in a row overflowed fp16"):
        run_train(tmp_path / "run", "--epochs", "9", "--augment", "none")


@pytest.fixture
def broken_pipe():
    """The end to write to of a pipe whose reader has left, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full disk")
def test_output_that_cannot_be_written_ends_a_program_without_a_traceback(broken_pipe):
    """A reader that has left; a full disk; no output at all."""
    command, full = "flops.py fishnet_tiny", "flops.py: standard output: No space left on device\n"
    with open("/dev/full", "w") as full_disk:
        for output, code, line in ((broken_pipe, 128 + signal.SIGPIPE, ""), (full_disk, 1, full)):
            ended = subprocess.run(
                [sys.executable, *command.split()], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
            )
            assert (ended.returncode, ended.stderr) == (code, line)
    closed = ["sh", "-c", f"{sys.executable} {command} >&-"]
    assert subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE).stderr == b""


def test_an_epoch_is_saved_before_it_is_printed(cifar_dir, tmp_path, broken_pipe):
    """Its line is the first that leaves the buffer; nobody reads it, and the run ends."""
    flags = ["--data-dir", cifar_dir, "--output-dir", tmp_path / "run", "--epochs", "3", "-b", "16"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, "train.py", *SMALL, *flags], cwd=ROOT, env=environment | {"ACCELERATE_USE_CPU": "true"},
        stdout=broken_pipe, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ended.returncode == 128 + signal.SIGPIPE and "Traceback" not in ended.stderr
    assert load(tmp_path / "run" / "last.pt")["state"]["epoch"] == 1
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2
