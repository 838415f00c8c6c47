"""Try to break what the project promises: kills, signals, full disks, damaged and hostile files.

    python tests/torture.py                      # everything, 7 minutes on one core
    python tests/torture.py --only kills images  # some parts
    python tests/torture.py --quick              # a tenth of the cases

Run it by hand, on Linux. It ends with a table of faults, which must all be zero; otherwise the exit
code is 1. Seeds are fixed: only the moments of kills and signals differ from one call to another.
Each run of train.py is forked from this process, which has imported torch but computes nothing.
"""

import argparse
import ctypes
import io
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
logging.disable(logging.WARNING)  # TensorBoard reports every resume
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

# ruff: noqa: E402 - the environment comes first
import numpy as np
import PIL
import torch
from conftest import SMALL, write_cifar10
from PIL import Image
from test_evaluate import BATCHES, SIZES, by_numpy, counted
from test_train import assert_same, keep_every_step, outcome

import train
from data import read_batch, read_image, read_pickle
from evaluate import Metrics, load_checkpoint, load_pretrained
from fishnet import UserError, create_model

STEPS = 12  # of the run of three epochs that most parts use
RESUME = ("--resume", "auto")
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
KINDS = ("wrong", "traceback", "hang", "lost", "code ran")  # of faults
# A process may end with one of these errors, and a traceback, when it loses its neighbour.
CONNECTION_ERRORS = "gloo|[Cc]onnect|Broken pipe"

REMARKS: dict[str, str] = {}  # of parts, for the table

def work(name: str) -> Path:
    """Return a path in the folder of this program's files."""
    return FOLDER / name

def fresh(name: str) -> Path:
    """Return such a path after removing what was there."""
    shutil.rmtree(work(name), ignore_errors=True)
    return work(name)

# -------------------------------------------------------------------------------------- processes

def start(log: Path, function: Callable, count: int = 1) -> list[multiprocessing.Process]:
    """Call a function in forked processes, which write to a log and find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank: int) -> None:
        os.setpgid(0, 0)  # each has a process group of its own
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)
        if count > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            numbers |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in numbers.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        function()

    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=call, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
        with suppress(OSError):  # here too, since a signal to the group may come at once
            os.setpgid(process.pid, process.pid)
    return processes

def send(number: int, process: multiprocessing.Process, to_group: bool = True) -> None:
    """Send a signal to a process that has not ended."""
    if process.exitcode is None:
        (os.killpg if to_group else os.kill)(process.pid, number)

def wait(processes: list[multiprocessing.Process], seconds: float) -> list[int | None]:
    """Return exit codes, or None where a process hangs. As with torchrun, the failure of one ends
    the others: they get SIGTERM, and SIGKILL after 30 seconds."""
    end, has_failed = time.monotonic() + seconds, False
    while None in (codes := [p.exitcode for p in processes]) and time.monotonic() < end:
        if any(codes) and not has_failed:
            has_failed, end = True, min(end, time.monotonic() + 30)
            for process in processes:
                send(TERM, process)
        time.sleep(0.003)
    for process in processes:
        send(KILL, process)
    return codes

def has_orphans(seconds: float = 15.0) -> bool:
    """Return whether processes live so much longer than the run that began them. They have become
    children of this program, as main arranges."""
    children, end = Path(f"/proc/self/task/{os.getpid()}/children"), time.monotonic() + seconds
    while time.monotonic() < end:
        known = {str(process.pid) for process in multiprocessing.active_children()}
        orphans = set(children.read_text().split()) - known
        if not orphans:
            return False
        for pid in orphans:
            os.waitpid(int(pid), os.WNOHANG)
        time.sleep(0.02)
    return True

class Run:
    """train.py on a small CIFAR-10, in one process or several."""

    def __init__(self, folder: Path, *flags: str, count: int = 1, hook: Callable = int) -> None:
        self.folder = folder
        self.flags = flags
        self.count = count
        self.hook = hook  # called in each process before train.main
        self.log = work(f"{folder.name}.log")
        self.processes: list[multiprocessing.Process] = []

    def start(self) -> "Run":
        # TensorBoard reads event files in the order of their names: second, host, process. Within
        # one second, process 10000 would come before process 9999.
        seconds = [int(path.name.split(".")[3]) for path in self.folder.glob("events.*")]
        time.sleep(max(0.0, max(seconds, default=0) + 1 - time.time()))
        self.log.write_text("")
        self.processes = start(self.log, self.main, self.count)
        return self

    def main(self) -> None:
        paths = ["--data-dir", str(work("cifar")), "--output-dir", str(self.folder)]
        flags = ["-b", "16", "--epochs", "3", "--checkpoint-every", "1", *self.flags]
        sys.argv = ["train.py", *SMALL, *paths, *flags]
        self.hook()
        train.main()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, *allowed: int, excused: str = "") -> str:
        """Wait for the end; return "" or a fault. Exit codes have to be `allowed`, if any is given,
        and a traceback has to end with an error that matches `excused`."""
        codes, output, kind = wait(self.processes, 120), self.output(), ""
        errors = re.findall(r"^[\w.]*(?:Error|Exception(?! in thread)|Interrupt)\b.*", output, re.M)
        if None in codes or (-KILL not in codes and has_orphans()):
            kind = "hang"
        elif "Traceback" in output and not (excused and all(re.search(excused, e) for e in errors)):
            kind = "traceback"
        elif allowed and not set(codes) <= set(allowed):
            kind = "wrong"
        note = f"{self.folder.name} {' '.join(self.flags)} ends with {codes}: {output[-600:]}"
        return f"{kind}: {note}" if kind else ""

@cache
def reference(count: int) -> tuple[dict, float]:
    """Return the outcome of a run that nothing interrupts, and its duration in seconds."""
    run, started = Run(fresh(f"reference{count}"), count=count), time.monotonic()
    fault = run.start().end(0)
    assert not fault, fault
    return outcome(run.folder), time.monotonic() - started

def complete(run: Run) -> str:
    """Let a run go to its end. Return "" if that is, bit for bit, the end of a run that nothing
    interrupts, else a fault."""
    if fault := run.start().end(0):
        return fault
    try:
        assert_same(reference(run.count)[0], outcome(run.folder))
    except Exception as error:
        return f"wrong: {run.folder.name} differs: {error!r}: {run.output()[-600:]}"
    return ""

def judge_all(cases: Iterable, judge: Callable[[object], str | None]) -> Iterator[str]:
    """Call judge(case), which returns a fault or raises an error if a case goes wrong."""
    for case in cases:
        try:
            yield judge(case) or ""
        except AssertionError as error:
            yield f"wrong: case {case}: {error}"
        except Exception as error:
            yield f"traceback: case {case}: {error!r}"

# ------------------------------------------------------------------------------------- evaluation

def part_evaluation(quick: bool) -> Iterator[str]:
    """Count every image once, on one, two and three processes, and compare with numpy."""
    results, log = work("results"), work("counted.log")

    def count_all() -> None:
        accelerator = train.Accelerator()
        assert accelerator.num_processes == processes
        found = [(n, batch, counted(accelerator, n, batch)) for n in SIZES for batch in BATCHES]
        if accelerator.is_main_process:
            results.write_bytes(pickle.dumps(found))
        accelerator.end_training()

    for processes in (1, 2, 3):
        codes = wait(start(log, count_all, processes), 120)
        assert codes == [0] * processes, log.read_text()
        for n, batch, (*counts, probability, loss) in pickle.loads(results.read_bytes()):
            *expected, expected_probability, expected_loss = by_numpy(n)
            is_close = np.allclose([*probability, loss], [*expected_probability, expected_loss])
            note = f"{n} images, batch {batch}, {processes} processes"
            yield "" if counts == expected and is_close else f"wrong: {note}"

# -------------------------------------------------------------------------- resume, kills, signals

def signal_in_steps(signals: dict[int, int], to_group: bool = False) -> None:
    """Let the main process send a signal to itself, or to its group, in each of these steps, just
    before the optimizer changes the weights."""
    measure_gradient = train.measure_gradient

    def measure(run: train.Run) -> torch.Tensor:
        number = signals.get(run.state.step + 1)
        if number and run.accelerator.is_main_process:
            os.kill(0 if to_group else os.getpid(), number)
        return measure_gradient(run)

    train.measure_gradient = measure

def signal_in_save(line: int, number: int, to_group: bool = False) -> None:
    """Let the main process send a signal to itself, or to its group, inside write_atomic: before
    this line, counted over all files that it writes."""
    lines = itertools.count(1)

    def trace(frame: object, event: str, value: object) -> Callable | None:
        if frame.f_code is not train.write_atomic.__code__:
            return None
        if event == "line" and next(lines) == line:
            os.kill(0 if to_group else os.getpid(), number)
        return trace

    sys.settrace(trace)

def part_resume(quick: bool) -> Iterator[str]:
    """Resume from the checkpoint of every step, and after each of five signals."""
    signals = {2: INT, 4: TERM, 5: INT, 8: TERM, 11: INT}
    kinds = [(1, "0"), (2, "2")] if quick else itertools.product((1, 2), ("0", "2"))
    for processes, workers in kinds:
        name, flags = f"resume{processes}{workers}", ("--workers", workers, *RESUME)
        keep = partial(keep_every_step, fresh(name))
        yield complete(Run(work(name), *flags[:2], count=processes, hook=keep))
        for step in range(1, STEPS + 1, 6 if quick else 1):
            yield complete(Run(work(f"{name}-{step}"), *flags, count=processes))
        hook = partial(signal_in_steps, signals)
        run = Run(fresh(name), *flags, count=processes, hook=hook)
        for number in signals.values():
            yield run.start().end(128 + number)
        yield complete(run)
    REMARKS["resume"] = "0 and 2 workers, 1 and 2 processes"

def newest_step(folder: Path) -> int:
    """Return the step of the newest whole checkpoint of a folder, or -1 if it has none."""
    steps = [-1]
    for name in ("last.pt", "previous.pt"):
        with suppress(UserError):
            steps.append(load_checkpoint(folder / name)["state"]["step"])
    return max(steps)

def part_kills(quick: bool) -> Iterator[str]:
    """Kill a run five times, by turns inside a save and at a random moment, then let it end."""
    rng = random.Random(1)
    for chain in range(4 if quick else 16):
        workers, processes = (("0", 1), ("2", 1), ("0", 2), ("2", 2))[chain % 4]
        flags, folder, before = ("--workers", workers, *RESUME), fresh("kills"), -1
        for kill in range(5):
            if (chain + kill) % 2:
                hook = partial(signal_in_save, rng.randint(1, 120), KILL)
                run = Run(folder, *flags, count=processes, hook=hook).start()
            else:
                run = Run(folder, *flags, count=processes).start()
                time.sleep(rng.uniform(0, reference(processes)[1]))
                send(KILL, rng.choice(run.processes), to_group=False)
            # The neighbour ends with an error or by SIGTERM; or all was done before the kill.
            fault = run.end(0, 1, 128 + TERM, -TERM, -KILL, excused=CONNECTION_ERRORS)
            after = newest_step(folder)
            if after < before:
                fault = f"lost: step {before}, only {after} is left: {run.output()[-600:]}"
            yield fault
            before = after
        yield complete(Run(folder, *flags, count=processes))
    REMARKS["kills"] = "half of them inside a save; after each five a resume to the end"

def part_signals(quick: bool) -> Iterator[str]:
    """Send SIGTERM or SIGINT, to a process or to its group with the data workers: at a random
    moment, inside a save or inside a step. Then resume to the end."""
    rng, slowest = random.Random(2), 0.0
    for case in range(0, 96, 11 if quick else 1):
        to_group, workers, processes = case % 2 == 1, str(case // 2 % 2 * 2), case // 4 % 2 + 1
        number, moment = (TERM, INT)[case // 8 % 2], case // 16 % 3
        in_save = partial(signal_in_save, rng.randint(20, 250), number, to_group)  # not args.json's
        in_step = partial(signal_in_steps, {rng.randint(1, STEPS): number}, to_group)
        flags = ("--workers", workers, *RESUME)
        run = Run(fresh("signals"), *flags, count=processes, hook=(int, in_save, in_step)[moment])
        run.start()
        is_listening = True
        if moment == 0:
            time.sleep(rng.uniform(0, reference(processes)[1]))
            is_listening, sent = (run.folder / "last.pt").exists(), time.monotonic()
            for _ in range(rng.randint(1, 2)):
                send(number, rng.choice(run.processes), to_group)
        # Before the first save there may be no handler yet, and Ctrl-C may print a traceback.
        fault = run.end(0, 128 + number) if is_listening else run.end(excused=".")
        if moment == 0 and is_listening:
            slowest = max(slowest, time.monotonic() - sent)
        saved = re.search(r"saved step (\d+);", run.output())
        if not fault and saved and int(saved[1]) != newest_step(run.folder):
            fault = f"lost: step {newest_step(run.folder)} is the last: {run.output()[-600:]}"
        yield fault or complete(Run(run.folder, *flags, count=processes))
    REMARKS["signals"] = f"the slowest exit {slowest:.1f} s after the signal"

# -------------------------------------------------------------------------- damaged, hostile files

def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, and overwrite, repeat or drop bytes, at a few places; or cut off the end."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        # Headers decide more than pixels and weights do.
        at = rng.randrange(rng.choice([len(changed), min(200, len(changed))]))
        part = changed[at : at + rng.choice([1, rng.randint(1, 20)])]
        flipped = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:]
        others = [flipped, flipped, rng.randbytes(len(part)), part + part, part[1:]]
        changed[at : at + len(part)] = rng.choice(others)
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)

def read_or_refuse(path: Path, read: Callable, *arguments: object) -> object:
    """Return what a function returns, or None if it refuses the file by name in one line."""
    try:
        return read(path, *arguments)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
    return None

def part_checkpoints(quick: bool) -> Iterator[str]:
    """Damage checkpoints. Each is refused, or has the whole content, and --resume auto continues
    from the one before it."""
    path, run = work("damaged.pt"), Run(fresh("whole"), hook=partial(signal_in_steps, {6: TERM}))
    fault = run.start().end(128 + TERM)
    assert not fault, fault
    whole, expected = (run.folder / "last.pt").read_bytes(), load_checkpoint(run.folder / "last.pt")

    def judge(case: int) -> None:
        path.write_bytes(mutate(whole, random.Random(case)))
        assert_same(read_or_refuse(path, load_checkpoint) or expected, expected)

    yield from judge_all(range(100 if quick else 1000), judge)
    for case in range(1 if quick else 10):
        folder = fresh("damaged")
        shutil.copytree(run.folder, folder)
        (folder / "last.pt").write_bytes(mutate(whole, random.Random(case)))
        is_damaged = newest_step(folder) == 5
        fault = complete(Run(folder, *RESUME))
        if is_damaged != (folder / "last.pt.damaged").exists():
            fault = fault or f"wrong: last.pt.damaged, case {case}"
        yield fault

def write_images() -> list[bytes]:
    """Return image files of all formats."""
    rng, files = np.random.default_rng(5), []
    pixels, grey = rng.integers(0, 256, (12, 17, 4), np.uint8), rng.integers(0, 2**16, (12, 17))
    images = [Image.fromarray(pixels), Image.fromarray(grey.astype(np.uint16))]
    images += [images[0].convert("RGB").convert(mode) for mode in ("RGB", "L", "1", "P", "CMYK")]
    formats = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    for form, image in itertools.product(formats, images):
        file = io.BytesIO()
        with suppress(OSError, ValueError):  # no format has all of these modes
            image.save(file, form)
            files.append(file.getvalue())
    return files

def correct_checksums(png: bytes) -> bytes:
    """Return a PNG in which each chunk has the checksum of its content, without which a decoder
    would refuse nearly every change at once."""
    result, at = png[:8], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        result += png[at:end] + zlib.crc32(png[at + 4 : end]).to_bytes(4)
        at = end + 4
    return result

def part_images(quick: bool) -> Iterator[str]:
    """Damage images. Each is decoded to pixels or refused."""
    files, path = write_images(), work("damaged.image")

    def judge(case: int) -> None:
        rng = random.Random(case)
        content = mutate(rng.choice(files), rng)
        if content.startswith(b"\x89PNG") and rng.random() < 0.7:
            content = correct_checksums(content)
        path.write_bytes(content)
        found = read_or_refuse(path, read_image)
        assert found is None or (found.dtype == torch.uint8 and len(found) == 3 and found.numel())

    yield from judge_all(range(200 if quick else 2000), judge)

def part_cifar(quick: bool) -> Iterator[str]:
    """Damage CIFAR's files. Each is refused, or read as Python's own unpickler reads it."""
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    content = {b"labels": [0, 9, 4, 4, 1, 7], b"data": rows, b"filenames": [b"a.png"] * 6}
    path = work("data_batch")

    def judge(case: int) -> None:
        changed = mutate(pickle.dumps(content, protocol=2 + case % 4), random.Random(case))
        path.write_bytes(changed)
        found = read_or_refuse(path, read_batch, b"labels", 10)
        if found is not None:
            expected = pickle.loads(changed, encoding="bytes")
            assert np.array_equal(found[0].flatten(1), expected[b"data"])
            assert found[1].tolist() == expected[b"labels"]

    yield from judge_all(range(50 if quick else 500), judge)

class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call

def part_hostile(quick: bool) -> Iterator[str]:
    """Read files that make another file as soon as they are unpickled."""
    path, made = work("hostile"), work("made.npy")
    calls = [Call(os.system, f"touch {made}"), Call(exec, f"open({str(made)!r}, 'w')")]
    calls += [Call(subprocess.check_call, ["touch", str(made)]), Call(Path.touch, made)]
    calls += [Call(np.save, str(made), 1), Call(torch.save, 1, str(made))]
    load_weights = partial(load_pretrained, create_model("fishnet_tiny"))
    read_labels = partial(read_batch, label_key=b"labels", num_classes=10)

    def judge(case: tuple[Call, Callable]) -> str:
        hostile, read = case
        if read in (load_checkpoint, load_weights):
            unpickle = partial(torch.load, weights_only=False)
            torch.save({"model": hostile}, path)
        else:
            unpickle = partial(np.load, allow_pickle=True)
            path.write_bytes(pickle.dumps({b"data": hostile}))
        is_refused = read_or_refuse(path, read) is None
        if made.exists():
            return f"code ran: {hostile.call} by {read}"
        unpickle(path)
        is_armed = made.exists()
        made.unlink(missing_ok=True)
        return "" if is_refused and is_armed else f"wrong: {hostile.call} by {read}"

    readers = (load_checkpoint, load_weights, read_labels, read_pickle)
    yield from judge_all(itertools.product(calls, readers), judge)

# ------------------------------------------------------------------------- disks, workers, memory

def fail(run: Run, reason: str, step: int = -1, excused: str = "") -> str:
    """Let a run fail. Return "" if that ends it with exit code 1 and one line with the reason, and
    leaves a checkpoint of at least this step, else a fault."""
    if fault := run.start().end(1, excused=excused):
        return fault
    lines = [line for line in run.output().splitlines() if line.startswith("train.py: ")]
    is_one_line = len(lines) == 1 and reason in lines[0]
    kind = "" if is_one_line or "Traceback" in run.output() else "wrong"
    kind = "lost" if newest_step(run.folder) < step else kind
    return f"{kind}: expected {reason!r} and step {step}: {run.output()[-600:]}" if kind else ""

def part_disks(quick: bool) -> Iterator[str]:
    """Write to full and read-only disks, and to a folder in use."""
    full, folder = "No space left on device", work("disk")
    run = Run(fresh("stopped"), hook=partial(signal_in_steps, {5: TERM}))
    yield run.start().end(128 + TERM)
    half = (run.folder / "last.pt").stat().st_size // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half))
    yield fail(Run(run.folder, *RESUME, hook=limit), "File too large", step=5)
    yield complete(Run(run.folder, *RESUME))

    work("file").touch()
    yield fail(Run(work("file")), "file")
    first = Run(fresh("used"), "--epochs", "500").start()
    while not (first.folder / "last.pt").exists():
        time.sleep(0.05)
    second = Run(first.folder, "--epochs", "500", *RESUME)
    second.log = work("second.log")
    yield fail(second, "in use by another run")
    send(TERM, first.processes[0])
    yield first.end(128 + TERM)

    # The disk is full at different moments. TensorBoard then raises errors of its own.
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder]).returncode:
        REMARKS["disks"] = "without full disks, which only root can mount"
        return
    try:
        for kilobytes in (4, 200, *(200 + n * half // 512 for n in (1, 2, 3))):
            fresh(folder.name)
            remount(folder, f"size={kilobytes}k")
            yield fail(Run(folder, *RESUME), full, excused=full)
            remount(folder, "size=100m")
            yield complete(Run(folder, *RESUME))
        remount(folder, "ro")
        yield fail(Run(folder, *RESUME), "Read-only file system", step=STEPS)
        yield fail(Run(folder / "new"), "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)

def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

def part_machine(quick: bool) -> Iterator[str]:
    """Kill data workers, refuse memory, and let losses overflow."""
    rng, flags = random.Random(3), ("--workers", "2", *RESUME)
    for _ in range(1 if quick else 10):
        run = Run(fresh("worker"), *flags).start()
        time.sleep(rng.uniform(0, reference(1)[1]))
        pid, workers = run.processes[0].pid, []
        while not workers and run.processes[0].exitcode is None:
            with suppress(OSError):
                workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        with suppress(OSError, IndexError):  # the run or the worker has come to its end
            os.kill(int(rng.choice(workers)), KILL)
        fault = run.end(0, 1, excused=CONNECTION_ERRORS)
        if "train.py: " in run.output() and not re.search("train.py: .*worker", run.output()):
            fault = fault or f"wrong: {run.output()[-600:]}"
        yield fault or complete(Run(run.folder, *flags))

    large = ("--model-args", "channels=(256,512,512,512)", "k=2", "-b", "64")
    hook = partial(limit_memory, 250 << 20)
    yield fail(Run(fresh("memory"), *large, hook=hook), "out of memory")
    run = Run(fresh("overflow"), hook=partial(signal_in_steps, {3: TERM}))
    yield run.start().end(128 + TERM)
    yield fail(Run(run.folder, *RESUME, "--override", "--lr", "1e18"), "not finite", step=3)
    yield complete(Run(run.folder, *RESUME, "--override"))
    run = Run(fresh("nan"), hook=spoil_validation)
    yield fail(run, "not finite", step=3)
    yield complete(Run(run.folder, *RESUME))

def limit_memory(free: int) -> None:
    """Let the kernel refuse this process more than so many bytes on top of what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free))

def spoil_validation() -> None:
    """Let each validation loss be NaN."""
    evaluate = train.evaluate
    train.evaluate = lambda *args: Metrics(**vars(evaluate(*args)) | {"loss": math.nan})

# -------------------------------------------------------------------------------------------- main

# A part yields "" for each case that goes well, else a fault "KIND: what happened".
PARTS = {name[5:]: value for name, value in globals().items() if name.startswith("part_")}

def main() -> None:
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--quick", action="store_true", help="a tenth of the cases")
    args = parser.parse_args()
    # One core for all: threads of programs that share cores wait for one another.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, for has_orphans
    started, table, has_failed = time.monotonic(), [], False
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync takes no time
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as folder:
        FOLDER = Path(folder)
        work("cifar").mkdir()
        write_cifar10(work("cifar"), 16, 10)
        for name in args.only:
            began = time.monotonic()
            cases = list(PARTS[name](args.quick))
            faults, seconds = list(filter(None, cases)), time.monotonic() - began
            print(f"{name:<11} {len(cases):>5} cases {len(faults):>3} faults {seconds:>4.0f} s")
            print(*(f"    {fault}\n" for fault in faults), sep="", end="", flush=True)
            kinds = [fault.partition(": ")[0] for fault in faults]
            numbers = " | ".join(str(kinds.count(kind)) for kind in KINDS)
            table.append(f"| {name} | {len(cases):,} | {numbers} | {REMARKS.get(name, '')} |")
            has_failed = has_failed or bool(faults)
    minutes, python = (time.monotonic() - started) / 60, sys.version.split()[0]
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}"
    print(f"\n{minutes:.1f} minutes, {time.strftime('%F')}, Python {python}, {versions}\n")
    print("| part | cases |", " | ".join(KINDS), "| remark |")
    print("| --- " * (len(KINDS) + 3) + "|", *table, sep="\n")
    sys.exit(has_failed)

if __name__ == "__main__":
    main()
