"""Try to break what the project promises: kills, signals, full disks, damaged and hostile files.

    python tests/torture.py                      # everything, 12 minutes on one core
    python tests/torture.py --only kills images  # some parts
    python tests/torture.py --quick              # a tenth of the cases

Run it by hand, on Linux. It ends with a table of faults, all of which must be zero; otherwise the
exit code is 1. Seeds are fixed, and only the moments of kills and signals differ from run to run.
Each run of train.py is forked from this process, which has imported torch but computes nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import io
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
warnings.simplefilter("ignore")
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
from evaluate import load_checkpoint, load_pretrained
from fishnet import UserError, create_model

STEPS = 12  # of the run of three epochs that most parts use
KINDS = ("wrong", "traceback", "hang", "lost", "code ran")
RESUME = ("--resume", "auto")
# A process that loses its neighbour may print a traceback with one of these.
CONNECTION_ERROR = "gloo|[Cc]onnect|Broken pipe"
ANY_ERROR = "."

class Counts:
    """Count the cases of one part and keep their faults."""

    def __init__(self) -> None:
        self.cases = 0
        self.faults: list[str] = []
        self.remark = ""

    def add(self, fault: str = "") -> None:
        """Count a case. A fault reads "KIND: what happened"; an empty one means that all went well."""
        self.cases += 1
        if fault:
            self.faults.append(fault)

    def count(self, kind: str) -> int:
        return sum(fault.startswith(f"{kind}: ") for fault in self.faults)

def work(name: str) -> Path:
    """Return a path in the folder of this program's files."""
    return FOLDER / name

def fresh(name: str) -> Path:
    """Return such a path after removing what was there."""
    shutil.rmtree(work(name), ignore_errors=True)
    return work(name)

# -------------------------------------------------------------------------------------- processes

class Child:
    """A forked process that leads a process group and writes its output to a file."""

    def __init__(self, log: Path, function: Callable, *arguments: object) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.call, args=(log, function, *arguments))
        self.process.start()
        self.pid = self.process.pid
        with contextlib.suppress(OSError):  # here too, since a signal to the group may come at once
            os.setpgid(self.pid, self.pid)

    def call(self, log: Path, function: Callable, *arguments: object) -> None:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)
        function(*arguments)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the process has not ended in this time."""
        end = time.monotonic() + seconds
        while self.process.exitcode is None and time.monotonic() < end:
            time.sleep(0.003)
        return self.process.exitcode

    def signal(self, number: int, to_group: bool = True) -> None:
        with contextlib.suppress(OSError):
            (os.killpg if to_group else os.kill)(self.pid, number)

    def has_orphans(self, seconds: float = 15.0) -> bool:
        """Return whether a process of the group is left so long after its leader's end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except OSError:
                return False
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        return True

class Run:
    """train.py on a small CIFAR-10, in one process or several."""

    def __init__(
        self, folder: Path, *flags: str, processes: int = 1, hook: Callable | None = None
    ) -> None:
        self.folder = folder
        self.flags = flags
        self.processes = processes
        self.hook = hook  # called in each process before train.main
        self.log = work(f"{folder.name}.log")
        self.children: list[Child] = []
        self.codes: list[int | None] = []

    def start(self) -> "Run":
        # TensorBoard reads event files in the order of their names: second, host, process. Within
        # one second, process 10000 would come before process 9999.
        seconds = [int(p.name.split(".")[3]) for p in self.folder.glob("events.out.tfevents.*")]
        time.sleep(max(0.0, max(seconds, default=0) + 1 - time.time()))
        self.log.unlink(missing_ok=True)
        self.children = start_processes(self.log, self.processes, self.main)
        return self

    def main(self) -> None:
        flags = ["-b", "16", "--epochs", "3", "--checkpoint-every", "1", *self.flags]
        paths = ["--data-dir", str(work("cifar")), "--output-dir", str(self.folder)]
        sys.argv = ["train.py", *SMALL, *paths, *flags]
        if self.hook:
            self.hook()
        train.main()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float) -> list[int | None]:
        """Return exit codes, or None where a process hangs. As with torchrun, the failure of one
        process ends the others: they get SIGTERM, and SIGKILL after 30 seconds."""
        end, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.children) and time.monotonic() < end:
            for child in self.children:
                if child not in codes and (code := child.wait(0.005)) is not None:
                    codes[child] = code
                    for other in self.children if code else ():
                        if other not in codes:
                            other.signal(signal.SIGTERM, to_group=False)
                            end = min(end, time.monotonic() + 30)
        for child in self.children:
            if child not in codes:
                child.signal(signal.SIGKILL)
        return [codes.get(child) for child in self.children]

    def end(self, *allowed: int, excused: str = "", seconds: float = 120.0) -> str:
        """Wait for the end; return "" or a fault. Exit codes have to be `allowed`, if any is given.
        Tracebacks have to end with an error that matches `excused`."""
        self.codes, output, kind = self.wait(seconds), self.output(), ""
        errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", output, re.M)
        if None in self.codes or any([child.has_orphans() for child in self.children]):
            kind = "hang"
        elif "Traceback" in output and not (excused and all(re.search(excused, e) for e in errors)):
            kind = "traceback"
        elif allowed and not set(self.codes) <= set(allowed):
            kind = "wrong"
        note = f"{self.folder.name} {' '.join(self.flags)} ended with {self.codes}: {output[-600:]}"
        return f"{kind}: {note}" if kind else ""

def start_processes(log: Path, processes: int, function: Callable) -> list[Child]:
    """Call a function in several processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank: int) -> None:
        if processes > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            numbers |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in numbers.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        function()

    return [Child(log, call, rank) for rank in range(processes)]

@functools.cache
def reference(processes: int) -> tuple[dict, float]:
    """Return the outcome of a run that nothing interrupts, and the seconds that it takes."""
    run = Run(fresh(f"reference{processes}"), processes=processes)
    started = time.monotonic()
    fault = run.start().end(0)
    assert not fault, fault
    return read_outcome(run.folder), time.monotonic() - started

def read_outcome(folder: Path) -> dict:
    """Return all that an interrupted run shares with others. TensorBoard may have a validation twice,
    if the run was killed after it and before the save that follows."""
    found = outcome(folder)
    return found | {"scalars": {name: dict(points) for name, points in found["scalars"].items()}}

def complete(run: Run) -> str:
    """Let a run go to its end. Return "" if it ends, bit for bit, as one that nothing interrupts,
    else a fault."""
    if fault := run.start().end(0):
        return fault
    try:
        assert_same(reference(run.processes)[0], read_outcome(run.folder))
    except Exception as error:
        note = f"{run.folder.name} ends otherwise: {type(error).__name__} {error}"
        return f"wrong: {note}: {run.output()[-400:]}"
    return ""

def judged(cases: Iterable, judge: Callable[[object], str]) -> Counts:
    """Call judge(case) -> fault or "" for all cases in a forked process, so that one which crashes
    or hangs is counted and ends nothing else."""
    cases, counts, answers, log = list(cases), Counts(), fresh("answers"), work("judge.log")
    answers = work("answers.txt")
    answers.unlink(missing_ok=True)
    code = Child(log, judge_all, cases, judge, answers).wait(20 * len(cases))
    for line in answers.read_text().splitlines():
        counts.add(line)
    if code != 0:
        counts.add(f"hang: case {counts.cases} ends the process with {code}: {log.read_text()}")
    return counts

def judge_all(cases: list, judge: Callable, answers: Path) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), used + (3 << 30)))
    with answers.open("w", buffering=1) as file:
        for case in cases:
            signal.alarm(60)  # it ends the process
            try:
                fault = judge(case)
            except Exception as error:
                fault = f"traceback: case {case}: {type(error).__name__}: {error}"
            print(fault.replace("\n", " ")[:500], file=file)

# ------------------------------------------------------------------------------------- evaluation

def part_evaluation(quick: bool) -> Counts:
    """Count every image once, on 1, 2 and 3 processes, and compare with numpy."""
    counts = Counts()
    for processes in (1, 2, 3):
        results = work(f"counted{processes}")

        def count_all(results: Path = results) -> None:
            accelerator = train.Accelerator()
            found = [(n, b, counted(accelerator, n, b)) for n in SIZES for b in BATCHES]
            if accelerator.is_main_process:
                results.write_bytes(pickle.dumps((accelerator.num_processes, found)))
            accelerator.end_training()

        children = start_processes(work("counted.log"), processes, count_all)
        if any([child.wait(120) != 0 for child in children]):
            counts.add(f"wrong: {processes} processes: {work('counted.log').read_text()[-500:]}")
            continue
        used, found = pickle.loads(results.read_bytes())
        assert used == processes
        for size, batch, result in found:
            expected = by_numpy(size)
            is_same = result[:5] == expected[:5] and math.isclose(result[5], expected[5], rel_tol=1e-5)
            note = f"{size} images, batch {batch}, {processes} processes: {result}"
            counts.add("" if is_same else f"wrong: {note}")
    counts.remark = "sizes x batches x processes"
    return counts

# -------------------------------------------------------------------------- resume, kills, signals

def signal_in_steps(signals: dict[int, int], to_group: bool = False) -> None:
    """Let the main process send a signal to itself, or to its group, in each of these steps, before
    the optimizer changes the weights."""
    measure_gradient = train.measure_gradient

    def measure(run: train.Run) -> torch.Tensor:
        if run.accelerator.is_main_process and run.state.step + 1 in signals:
            os.kill(0 if to_group else os.getpid(), signals[run.state.step + 1])
        return measure_gradient(run)

    train.measure_gradient = measure

def signal_in_save(line: int, number: int, to_group: bool = False) -> None:
    """Let this process send a signal to itself, or to its group, inside write_atomic: before this
    line, counted over all files that it writes."""
    left = line

    def trace(frame: object, event: str, value: object) -> Callable | None:
        nonlocal left
        if frame.f_code is not train.write_atomic.__code__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(0 if to_group else os.getpid(), number)
        return trace

    sys.settrace(trace)

def part_resume(quick: bool) -> Counts:
    """Resume from the checkpoint of every step, and after each of five signals."""
    counts = Counts()
    stops = {2: signal.SIGINT, 4: signal.SIGTERM, 5: signal.SIGINT, 8: signal.SIGTERM, 11: signal.SIGINT}
    for processes in (1, 2):
        for workers in ("0", "2"):
            name, flags = f"resume{processes}{workers}", ("--workers", workers, *RESUME)
            keep = functools.partial(keep_every_step, fresh(name))
            counts.add(complete(Run(work(name), *flags[:2], processes=processes, hook=keep)))
            for step in range(1, STEPS + 1, 6 if quick else 1):
                folder = work(f"{name}-{step}")
                counts.add(complete(Run(folder, *flags, processes=processes)))
                shutil.rmtree(folder)
            hook = functools.partial(signal_in_steps, stops)
            run = Run(fresh(name), *flags, processes=processes, hook=hook)
            for number in stops.values():
                counts.add(run.start().end(128 + number))
            counts.add(complete(run))
    counts.remark = "0 and 2 workers, 1 and 2 processes"
    return counts

def newest_step(folder: Path) -> int:
    """Return the step of the newest whole checkpoint of a folder, or -1 if it has none."""
    steps = [-1]
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(UserError):
            steps.append(load_checkpoint(folder / name)["state"]["step"])
    return max(steps)

def part_kills(quick: bool) -> Counts:
    """Kill runs five times, by turns inside a save and at a random moment, then let them end."""
    counts, rng, inside = Counts(), random.Random(1), 0
    kinds = [("0", 1), ("2", 1), ("0", 2), ("2", 2)]
    for chain in range(4 if quick else 28):
        workers, processes = kinds[chain % 4]
        flags, folder, before = ("--workers", workers, *RESUME), fresh("kills"), -1
        for kill in range(5):
            if (chain + kill) % 2:
                hook = functools.partial(signal_in_save, rng.randint(1, 120), signal.SIGKILL)
                run = Run(folder, *flags, processes=processes, hook=hook).start()
                inside += 1
            else:
                run = Run(folder, *flags, processes=processes).start()
                time.sleep(rng.uniform(0, reference(processes)[1]))
                rng.choice(run.children).signal(signal.SIGKILL, to_group=False)
            fault = run.end(-signal.SIGKILL, -signal.SIGTERM, 0, 1, 143, excused=CONNECTION_ERROR)
            after = newest_step(folder)
            if after < before:
                fault = f"lost: from step {before} to {after}: {run.output()[-400:]}"
            counts.add(fault)
            before = after
        counts.add(complete(Run(folder, *flags, processes=processes)))
    counts.remark = f"{inside} of the kills inside a save; resumed to the end after each five"
    return counts

def part_signals(quick: bool) -> Counts:
    """Send SIGTERM or SIGINT, to a process or to its group with the data workers: at a random
    moment, inside a save or inside a step. Then resume to the end."""
    counts, rng, slowest = Counts(), random.Random(2), 0.0
    for case in range(0, 96, 11 if quick else 1):
        to_group, workers, processes = case % 2 == 1, str(case // 2 % 2 * 2), case // 4 % 2 + 1
        number, moment = (signal.SIGTERM, signal.SIGINT)[case // 8 % 2], case // 16 % 3
        hook = None
        if moment == 1:
            hook = functools.partial(signal_in_save, rng.randint(1, 250), number, to_group)
        elif moment == 2:
            hook = functools.partial(signal_in_steps, {rng.randint(1, STEPS): number}, to_group)
        flags = ("--workers", workers, *RESUME)
        run = Run(fresh("signals"), *flags, processes=processes, hook=hook).start()
        is_listening = True
        if not hook:
            time.sleep(rng.uniform(0, reference(processes)[1]))
            is_listening = (run.folder / "last.pt").exists()
            sent = time.monotonic()
            for _ in range(rng.randint(1, 2)):
                rng.choice(run.children).signal(number, to_group)
        elif moment == 1:
            is_listening = False  # args.json is written before training
        fault = run.end(128 + number, 0) if is_listening else run.end(excused=ANY_ERROR)
        if not hook and is_listening:
            slowest = max(slowest, time.monotonic() - sent)
        saved = re.search(r"saved step (\d+);", run.output())
        if not fault and saved and int(saved[1]) != newest_step(run.folder):
            fault = f"lost: step {newest_step(run.folder)}: {run.output()[-400:]}"
        counts.add(fault or complete(Run(run.folder, *flags, processes=processes)))
    counts.remark = f"the slowest exit {slowest:.1f} s after the signal"
    return counts

# -------------------------------------------------------------------------- damaged, hostile files

def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite, repeat or drop bytes at a few places, or cut off the end."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        # Headers decide more than pixels and weights do.
        at = rng.choice([rng.randrange(len(changed)), rng.randrange(min(200, len(changed)))])
        how = rng.randrange(4)
        if how < 2:
            changed[at] = rng.choice([changed[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
        elif how == 2:
            changed[at:at] = changed[at : at + rng.randrange(20)]
        elif len(changed) > 20:
            del changed[at : at + rng.randrange(20)]
    if rng.random() < 0.2:
        del changed[rng.randrange(1, len(changed)) :]
    return bytes(changed) or b"\0"

def refused(path: Path, function: Callable, *arguments: object) -> object:
    """Return None if one line names the file, else what the function returns."""
    try:
        return function(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
    return None

def part_checkpoints(quick: bool) -> Counts:
    """Change checkpoints at random. Each is refused by name or has the whole content, and --resume
    auto takes the one before it."""
    hook = functools.partial(signal_in_steps, {6: signal.SIGTERM})
    run, path = Run(fresh("whole"), hook=hook), work("changed.pt")
    fault = run.start().end(143)
    assert not fault, fault
    whole, expected = (run.folder / "last.pt").read_bytes(), load_checkpoint(run.folder / "last.pt")

    def judge(case: int) -> str:
        rng, content = random.Random(case), bytearray(whole)
        if case % 2:
            content = mutate(whole, rng)
        else:  # anywhere, not mostly at the beginning
            for _ in range(rng.choice([1, 1, 1, 50])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found = refused(path, load_checkpoint, path)
        with contextlib.suppress(AssertionError):
            if found is not None:
                assert_same(found, expected)
            return ""
        return f"wrong: accepted with another content, case {case}"

    counts = judged(range(100 if quick else 1000), judge)
    for case in range(1 if quick else 10):
        folder = fresh("damaged")
        shutil.copytree(run.folder, folder)
        content = mutate(whole, random.Random(case))
        (folder / "last.pt").write_bytes(content)
        fault = complete(Run(folder, *RESUME))
        if not fault and content != whole and not (folder / "last.pt.damaged").exists():
            fault = f"wrong: damaged/last.pt is not renamed, case {case}"
        counts.add(fault)
    return counts

def write_images() -> list[bytes]:
    """Return valid files of all formats."""
    rng, files = np.random.default_rng(5), []
    rgba = rng.integers(0, 256, (12, 17, 4), dtype=np.uint8)
    deep = rng.integers(0, 65536, (12, 17)).astype(np.uint16)
    images = {"RGB": Image.fromarray(rgba[..., :3]), "RGBA": Image.fromarray(rgba), "I;16": Image.fromarray(deep)}
    images |= {mode: images["RGB"].convert(mode) for mode in ("L", "1", "P", "CMYK")}
    for form in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        for image in images.values():
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):  # no format has all modes
                image.save(file, form)
                files.append(file.getvalue())
    return files

def correct_checksums(png: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of their content. Without them a decoder refuses
    nearly every change at once."""
    result, at = png[:8], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        result += png[at:end] + zlib.crc32(png[at + 4 : end]).to_bytes(4)
        at = end + 4
    return result

def part_images(quick: bool) -> Counts:
    """Change images at random. Each is decoded to pixels or refused by name."""
    seeds, path = write_images(), work("changed.image")

    def judge(case: int) -> str:
        rng = random.Random(case)
        content = mutate(rng.choice(seeds), rng)
        if content.startswith(b"\x89PNG") and rng.random() < 0.7:
            content = correct_checksums(content)
        path.write_bytes(content)
        found = refused(path, read_image, path)
        if found is None or found.dtype == torch.uint8 and len(found) == 3 and found[0, 0].numel():
            return ""
        return f"wrong: case {case}: {found.dtype} {tuple(found.shape)}"

    return judged(range(200 if quick else 2000), judge)

def part_cifar(quick: bool) -> Counts:
    """Change CIFAR's files at random. Each is refused by name or read as by Python's unpickler."""
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    content = {b"labels": [0, 9, 4, 4, 1, 7], b"data": rows, b"filenames": [b"a.png"] * 6}
    wholes, path = [pickle.dumps(content, protocol) for protocol in (2, 3, 4, 5)], work("data_batch")

    def judge(case: int) -> str:
        changed = mutate(wholes[case % 4], random.Random(case))
        path.write_bytes(changed)
        found = refused(path, read_batch, path, b"labels", 10)
        if found is None:
            return ""
        expected = pickle.loads(changed, encoding="bytes")
        pixels = np.reshape(expected[b"data"], (-1, 3, 32, 32))
        is_same = np.array_equal(found[0], pixels) and found[1].tolist() == list(expected[b"labels"])
        return "" if is_same and found[0].dtype == torch.uint8 else f"wrong: case {case}"

    return judged(range(50 if quick else 500), judge)

class Call:
    """An object whose pickle calls a function as soon as it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call

def part_hostile(quick: bool) -> Counts:
    """Read files that make another file when Python's own unpickler loads them."""
    path, canary = work("hostile"), work("canary.npy")
    calls = [
        Call(os.system, f"touch {canary}"), Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(subprocess.check_call, ["touch", str(canary)]), Call(Path.touch, canary),
        Call(np.save, str(canary), 1), Call(torch.save, 1, str(canary)),
    ]  # fmt: skip
    load_weights = functools.partial(load_pretrained, create_model("fishnet_tiny"))
    read_labels = functools.partial(read_batch, label_key=b"labels", num_classes=10)

    def read_freely(path: Path) -> object:
        return pickle.loads(path.read_bytes())

    def judge(case: tuple) -> str:
        call, read = case
        if read in (load_checkpoint, load_weights):
            obey = functools.partial(torch.load, weights_only=False)
            torch.save({"model": call}, path)
        else:
            obey = read_freely
            path.write_bytes(pickle.dumps({b"data": call}))
        is_refused = refused(path, read, path) is None
        if canary.exists():
            return f"code ran: {call.call} by {read}"
        obey(path)
        is_armed = canary.exists()
        canary.unlink(missing_ok=True)
        return "" if is_refused and is_armed else f"wrong: {call.call} by {read}"

    readers = load_checkpoint, load_weights, read_labels, read_pickle
    return judged([(call, read) for call in calls for read in readers], judge)

# --------------------------------------------------------------------------- disks, workers, memory

def part_machine(quick: bool) -> Counts:
    """Run into full and read-only disks, dying workers, too little memory and infinite numbers."""
    counts, rng = Counts(), random.Random(3)
    hook = functools.partial(signal_in_steps, {5: signal.SIGTERM})
    stopped = Run(fresh("stopped"), hook=hook)
    fault = stopped.start().end(143)
    assert not fault, fault
    size = (stopped.folder / "last.pt").stat().st_size

    def fails(run: Run, reason: str, step: int = -1, excused: str = "") -> None:
        """The run has to end with exit code 1 and one line with the reason, and keep its checkpoints."""
        fault = run.start().end(1, excused=excused)
        lines = [line for line in run.output().splitlines() if line.startswith("train.py: ")]
        is_said = len(lines) == 1 and reason in lines[0]
        if not fault and not is_said and not (excused and "Traceback" in run.output()):
            fault = f"wrong: no line with {reason!r}: {run.output()[-600:]}"
        if not fault and newest_step(run.folder) < step:
            fault = f"lost: step {step}: {run.output()[-600:]}"
        counts.add(fault)

    # A file may not grow beyond half a checkpoint, so the kernel refuses a write.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    fails(Run(stopped.folder, *RESUME, hook=limit), "File too large", step=5)
    counts.add(complete(Run(stopped.folder, *RESUME)))

    # The disk is full at different moments of the run. TensorBoard's own tracebacks are its affair.
    for kilobytes in (4, 200, *(200 + n * size // 1024 for n in (1, 2, 3))) if can_mount() else ():
        with mounted(f"size={kilobytes}k") as folder:
            fails(Run(folder, *RESUME), "No space left", excused="No space left")
            subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
            counts.add(complete(Run(folder, *RESUME)))
    if can_mount():
        with mounted("size=1m,ro") as folder:
            fails(Run(folder), "Read-only")
            fails(Run(folder / "new"), "Read-only")
    else:
        counts.remark = "not root: no full disks"
    work("file").write_text("")
    fails(Run(work("file")), "file")

    # Two runs in one folder.
    first = Run(fresh("used"), "--epochs", "500").start()
    while not (first.folder / "last.pt").exists():
        time.sleep(0.05)
    second = Run(first.folder, *RESUME, "--epochs", "500")
    second.log = work("second.log")
    fails(second, "in use by another run")
    first.children[0].signal(signal.SIGTERM)
    counts.add(first.end(143))

    # A data worker is killed.
    flags = ("--workers", "2", *RESUME)
    for _ in range(1 if quick else 8):
        run = Run(fresh("worker"), *flags).start()
        time.sleep(rng.uniform(0, reference(1)[1]))
        tasks = Path("/proc/{0}/task/{0}/children".format(run.children[0].pid))
        while run.children[0].wait(0) is None and not (workers := tasks.read_text().split()):
            time.sleep(0.001)
        with contextlib.suppress(OSError):
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
        fault = run.end(0, 1)
        if not fault and 1 in run.codes and "train.py: DataLoader worker" not in run.output():
            fault = f"wrong: {run.output()[-600:]}"
        counts.add(fault or complete(Run(run.folder, *flags)))

    # The kernel refuses memory.
    def limit_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), used + (250 << 20)))

    large = ("--model-args", "channels=(256,512,512,512)", "k=2", "-b", "64")
    fails(Run(fresh("memory"), *large, hook=limit_memory), "out of memory")
    # A learning rate at which the loss overflows, and a validation loss that is not a number.
    run = Run(fresh("overflow"), hook=functools.partial(signal_in_steps, {3: signal.SIGTERM}))
    counts.add(run.start().end(143))
    fails(Run(run.folder, *RESUME, "--override", "--lr", "1e18"), "not finite", step=3)
    counts.add(complete(Run(run.folder, *RESUME, "--override")))
    fails(Run(fresh("nan"), hook=spoil_validation), "the validation loss is not finite", step=3)
    counts.add(complete(Run(work("nan"), *RESUME)))
    return counts

def spoil_validation() -> None:
    """Let every validation loss be NaN."""
    evaluate = train.evaluate
    train.evaluate = lambda *args: dataclasses.replace(evaluate(*args), loss=math.nan)

@functools.cache
def can_mount() -> bool:
    try:
        with mounted("size=1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False

@contextlib.contextmanager
def mounted(options: str) -> Iterator[Path]:
    """Mount a disk in memory."""
    folder = work("disk")
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)

# ------------------------------------------------------------------------------------------- stall

def part_stall(quick: bool) -> Counts:
    """Compare a save of fishnet99 with Adam's state with the 156 steps of batch 256 between two."""
    counts, answer = Counts(), work("stall.txt")
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:  # on a disk, where training writes
        code = Child(work("stall.log"), measure_stall, answer, folder).wait(300)
    if code != 0:
        counts.add(f"wrong: ended with {code}: {work('stall.log').read_text()[-500:]}")
        return counts
    size, save, step = map(float, answer.read_text().split())
    share = save / (save + 156 * step)
    counts.add("" if share < 0.035 else f"wrong: {share:.2%}")
    counts.remark = f"{size / 1e6:.0f} MB in {save:.2f} s, a step {step:.1f} s: {share:.3%} of the time"
    return counts

def measure_stall(answer: Path, folder: str) -> None:
    """Write the size of a checkpoint and the seconds of a save and of a step. A batch of 32 images
    stands for an eighth of a step."""
    flags = ["--data-dir", str(work("cifar")), "--output-dir", folder, "-b", "32"]
    run = train.make_run(train.parse_args(flags))
    run.model.train()
    saves = []
    for _ in range(2):
        started = time.perf_counter()
        train.train_step(run, iter(run.loader))
        step = 8 * (time.perf_counter() - started)
    for _ in range(7):
        started = time.perf_counter()
        train.save(run, "last.pt")
        saves.append(time.perf_counter() - started)
    size = (run.folder / "last.pt").stat().st_size
    answer.write_text(f"{size} {statistics.median(saves)} {step}")

# -------------------------------------------------------------------------------------------- main

PARTS = {
    "evaluation": part_evaluation, "images": part_images, "cifar": part_cifar,
    "hostile": part_hostile, "checkpoints": part_checkpoints, "machine": part_machine,
    "resume": part_resume, "kills": part_kills, "signals": part_signals, "stall": part_stall,
}  # fmt: skip

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
    started, table = time.monotonic(), {}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync takes no time
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as folder:
        FOLDER = Path(folder)
        work("cifar").mkdir()
        write_cifar10(work("cifar"), 16, 10)
        for name in args.only:
            began = time.monotonic()
            table[name] = counts = PARTS[name](args.quick)
            print(f"{name:<12}{counts.cases:>5} cases{len(counts.faults):>4} faults"
                  f"{time.monotonic() - began:>5.0f} s  {counts.remark}", flush=True)  # fmt: skip
            print(*(f"    {fault}\n" for fault in counts.faults), sep="", end="", flush=True)
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}"
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.0f} minutes, {datetime.date.today()}, Python {platform.python_version()}, {versions}\n")
    print("| part | cases |", " | ".join(KINDS), "| remark |")
    print("| --- " * (len(KINDS) + 3) + "|")
    for name, counts in table.items():
        numbers = " | ".join(str(counts.count(kind)) for kind in KINDS)
        print(f"| {name} | {counts.cases:,} | {numbers} | {counts.remark} |")
    sys.exit(any(counts.faults for counts in table.values()))

if __name__ == "__main__":
    main()
