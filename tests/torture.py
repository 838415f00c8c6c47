"""What pytest has no time for: thousands of kills, signals, damaged and hostile files. Run it by hand, on Linux.

    python tests/torture.py                      # everything, 14 minutes on one core; ends with a table for the README
    python tests/torture.py --only kills images  # some parts
    python tests/torture.py --quick              # a tenth of each

Seeds are fixed; only the moments of kills and signals differ from run to run. The exit code is 1 if any case was wrong,
printed a traceback, hung, executed what a file asked for, or lost a checkpoint.

Runs and hostile files have processes of their own, forked from this one, which imports torch and computes nothing:
a crash or a hang there is counted and ends nothing else.
"""

import argparse
import atexit
import contextlib
import copyreg
import datetime
import functools
import io
import logging
import math
import os
import pickle
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # TensorBoard tells of every resume
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

# ruff: noqa: E402 - the environment comes first
import numpy as np
import PIL
import torch
from conftest import ROOT, SMALL, write_cifar10
from test_evaluate import BATCHES, SIZES, by_numpy, counted
from test_train import assert_same, keep_every_step, outcome
from torture_files import (
    PNG,
    Touch,
    changed_checkpoint,
    hostile_calls,
    hostile_forms,
    odd_images,
    rewritten,
    string,
    value,
    with_right_sums,
)

import data
import train
from data import read_batch, read_image
from evaluate import load_checkpoint, load_model

STEPS = 12  # of the run of three epochs that most parts use


@dataclass
class Counts:
    """Of one part. `notes`: what was wrong, to be read by whoever mends it."""

    cases: int = 0
    wrong: int = 0
    tracebacks: int = 0
    hangs: int = 0
    canaries: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)
    remark: str = ""

    def add(self, kind: str, note: str = "") -> None:
        """One case; kind is "" where it went as it must."""
        self.cases += 1
        if kind:
            setattr(self, kind, getattr(self, kind) + 1)
            self.notes.append(f"{kind}: {note}")

    @property
    def bad(self) -> int:
        return self.wrong + self.tracebacks + self.hangs + self.canaries + self.lost


# ------------------------------------------------------------------------------------------- processes of one's own


class Child:
    """A forked process that leads a process group, its output in a file. `wait` gives its exit code, None: it hung."""

    def __init__(self, log: Path, function: Callable, *arguments: object) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.run(function, *arguments)
        with contextlib.suppress(OSError):  # here too: a signal to the group may come at once
            os.setpgid(self.pid, self.pid)

    def run(self, function: Callable, *arguments: object) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            atexit._clear()  # the parent's: its folder stays
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            try:
                function(*arguments)
                code = 0
            except SystemExit as stop:
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr, flush=True)
                code = 1 if isinstance(stop.code, str) else stop.code or 0
            except BaseException:
                traceback.print_exc()
            threading._shutdown()  # as at an interpreter's end
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code)  # whatever a signal raises: the parent's folder stays

    def wait(self, seconds: float = 120.0, kill: bool = True) -> int | None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.003)
        if kill:
            self.kill()
        return None

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self.pid, 0)

    def orphans(self, seconds: float = 15.0) -> bool:
        """Whether a process of the group is left so long after its leader's end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except OSError:
                return False
            time.sleep(0.05)
        self.kill()
        return True


@dataclass
class Run:
    """train.py in a folder: its flags, its processes."""

    folder: Path
    flags: tuple[str, ...] = ()
    processes: int = 1
    hook: Callable | None = None  # called in each process before train.main
    children: list[Child] = field(default_factory=list)

    def start(self) -> "Run":
        # TensorBoard reads event files in the order of their names: second, host, process. Of runs that start in one
        # second, process 10000 would come before process 9999.
        seconds = [int(path.name.split(".")[3]) for path in self.folder.glob("events.out.tfevents.*")]
        time.sleep(max(0.0, max(seconds, default=0) + 1 - time.time()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log.unlink(missing_ok=True)
        self.children = [Child(self.log, self.main, rank, port) for rank in range(self.processes)]
        return self

    def main(self, rank: int, port: int) -> None:
        if self.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes),
                           "LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}  # fmt: skip
        base = [*SMALL, "-b", "16", "--epochs", "3", "--checkpoint-every", "1", "--data-dir", str(work("cifar"))]
        sys.argv = ["train.py", *base, "--output-dir", str(self.folder), *self.flags]
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as train.py begins
        if self.hook:
            self.hook()
        train.main()

    @property
    def log(self) -> Path:
        return work(self.folder.name + ".log")

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes. As torchrun does: where one process ends badly, the others get SIGTERM, at last SIGKILL."""
        end, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.children) and time.monotonic() < end:
            for child in self.children:
                if child not in codes and (code := child.wait(0.005, kill=False)) is not None:
                    codes[child] = code
                    for other in self.children if code else ():
                        if other not in codes:
                            os.kill(other.pid, signal.SIGTERM)
                            end = min(end, time.monotonic() + 30)
        for child in self.children:
            if child not in codes:
                child.kill()
        return [codes.get(child) for child in self.children]

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kind(self, codes: list[int | None], expected: Callable[[int], bool]) -> str:
        """"" or what is wrong with the run's end."""
        if None in codes:
            return "hangs"
        if "Traceback" in self.output():
            return "tracebacks"
        if any(child.orphans() for child in self.children):
            return "hangs"
        return "" if all(map(expected, codes)) else "wrong"


def work(name: str) -> Path:
    return FOLDER / name


def fresh(name: str) -> Path:
    shutil.rmtree(work(name), ignore_errors=True)
    return work(name)


def judged(cases: Iterable, judge: Callable[[object], str], limit: float = 20.0, memory: int = 3 << 30) -> Counts:
    """judge(case) -> "" or "kind: note", in a forked child with little memory; it is replaced when it dies or hangs."""
    cases, counts = list(cases), Counts()
    while counts.cases < len(cases):
        read, write = os.pipe()
        child = Child(work("judge.log"), judge_all, cases[counts.cases :], judge, write, memory)
        os.close(write)
        answers = b""
        while select.select([read], [], [], limit)[0]:
            part = os.read(read, 65536)
            if not part:
                break
            answers += part
            while b"\n" in answers:
                line, _, answers = answers.partition(b"\n")
                kind, _, note = line.decode(errors="replace").partition(": ")
                counts.add(kind, note)
            if counts.cases == len(cases):
                break
        os.close(read)
        if counts.cases < len(cases):
            code = child.wait(0.2)
            counts.add("hangs", f"case {counts.cases}: {'no answer' if code is None else f'died of {code}'}")
        child.kill()
    return counts


def judge_all(cases: list, judge: Callable, pipe: int, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    for case in cases:
        try:
            answer = judge(case)
        except BaseException as error:
            answer = f"tracebacks: {type(error).__name__}: {error}"
        os.write(pipe, answer.replace("\n", " ")[:500].encode() + b"\n")


def refused(path: Path, function: Callable, *arguments: object) -> object:
    """None if a one-line ValueError names the file, else what the function returns."""
    try:
        return function(*arguments)
    except ValueError as error:
        assert "\n" not in str(error) and (str(path) in str(error) or str(error).startswith("checkpoint: ")), error
    return None


# ----------------------------------------------------------------------------------------------------- whole runs


def differs(expected: dict, folder: Path) -> str:
    """"" or where the bits are others."""
    try:
        assert_same(expected, outcome(folder))
    except Exception as error:
        return f"{type(error).__name__} at {error}"
    return ""


@functools.cache
def reference(processes: int) -> dict:
    """The outcome of the run that nothing interrupts."""
    run = Run(fresh(f"reference{processes}"), processes=processes).start()
    codes = run.wait()
    assert codes == [0] * processes, run.output()
    return outcome(run.folder)


@functools.cache
def duration(processes: int) -> float:
    """Seconds of that run, on a machine as busy as this one."""
    began = time.monotonic()
    run = Run(fresh("timed"), processes=processes).start()
    assert run.wait() == [0] * processes, run.output()
    return time.monotonic() - began


def stop_at(steps: tuple[int, ...]) -> None:
    """A signal to oneself in the middle of each of these steps, the odd ones SIGTERM and the others SIGINT."""
    train_step = train.train_step

    def stopping(run: train.Run, *arguments: object) -> tuple:
        if run.state.step + 1 in steps and run.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM if run.state.step % 2 == 0 else signal.SIGINT)
        return train_step(run, *arguments)

    train.train_step = stopping


def part_resume(quick: bool) -> Counts:
    """From the checkpoint of every step, and through five signals, to the outcome of the run without."""
    counts = Counts()
    for processes in (1, 2):
        for workers in ("0", "2"):
            name = f"resume{processes}{workers}"
            flags = ("--workers", workers, "--resume", "auto")
            folder = fresh(name)
            run = Run(folder, flags[:2], processes, functools.partial(keep_every_step, folder)).start()
            kind = run.kind(run.wait(), lambda code: code == 0)
            note = differs(reference(processes), folder)
            counts.add(kind or ("wrong" if note else ""), f"{name} uninterrupted: {note or run.output()[-300:]}")
            for step in range(1, STEPS + 1, 6 if quick else 1):
                run = Run(work(f"{name}-{step}"), flags, processes).start()
                kind = run.kind(run.wait(), lambda code: code == 0)
                note = differs(reference(processes), run.folder)
                counts.add(kind or ("wrong" if note else ""), f"{name} from {step}: {note or run.output()[-300:]}")
                shutil.rmtree(run.folder)
            stops = (2, 4, 5, 8, 11)
            run = Run(fresh(name), flags, processes, functools.partial(stop_at, stops))
            for step in stops:
                kind = run.start().kind(run.wait(), lambda code, s=step: code == (143 if s % 2 else 130))
                counts.add(kind, f"{name}, signal in step {step}: {run.output()[-300:]}")
            kind = run.start().kind(run.wait(), lambda code: code == 0)
            note = differs(reference(processes), run.folder)
            counts.add(kind or ("wrong" if note else ""), f"{name} after five signals: {note or run.output()[-300:]}")
    return counts


# -------------------------------------------------------------------------------------------------- kills, signals


class DyingFile:
    """A file for writing that kills its process before, or in the middle of, a write, or before a flush."""

    def __init__(self, file: io.FileIO, tick: Callable) -> None:
        self.file, self.tick = file, tick

    def __enter__(self) -> "DyingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.tick("close")
        self.file.close()

    def write(self, content: bytes | memoryview) -> None:
        self.tick("write")
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.tick("middle")
        self.file.write(content[len(content) // 2 :])

    def flush(self) -> None:
        self.tick("flush")
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def die_inside_a_save(count: int, number: int = signal.SIGKILL, twice: bool = False) -> None:
    """The count-th of all that write_atomic does, in any file, is preceded by a signal to oneself."""
    state = {"left": count, "inside": False}
    write_atomic = train.write_atomic

    def tick(what: str) -> None:
        if state["inside"]:
            state["left"] -= 1
            if state["left"] == 0:
                Path(os.environ["TORTURE_MARK"]).write_text(str(time.monotonic()))
                for _ in range(1 + twice):
                    os.kill(os.getpid(), number)

    def inside(*arguments: object) -> None:
        state["inside"] = True
        write_atomic(*arguments)
        state["inside"] = False

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object, **keywords: object) -> object:
            tick(name)
            return original(*arguments, **keywords)

        setattr(owner, name, call)

    for name in ("fsync", "replace", "close"):
        wrap(os, name)
    original_open = Path.open

    def path_open(path: Path, *arguments: object, **keywords: object) -> object:
        tick("open")
        file = original_open(path, *arguments, **keywords)
        return DyingFile(file, tick) if state["inside"] else file

    Path.open = path_open
    train.write_atomic = inside


def newest_step(folder: Path) -> int:
    """Of the whole checkpoints of a folder; -1: it has none."""
    steps = [-1]
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(ValueError, OSError):
            steps.append(load_checkpoint(folder / name)["state"]["step"])
    return max(steps)


def part_kills(quick: bool) -> Counts:
    """Chains of five kills, by turns inside a save and at a random moment, then a run to the end."""
    counts, rng = Counts(), random.Random(1)
    os.environ["TORTURE_MARK"] = str(work("mark"))
    kinds = [("0", 1), ("0", 1), ("2", 1), ("0", 2)]
    inside = 0
    for chain in range(4 if quick else 40):
        workers, processes = kinds[chain % 4]
        flags = ("--workers", workers, "--resume", "auto")
        folder, before = fresh("kills"), -1
        for kill in range(5):
            if (chain + kill) % 2:  # 50 to 60 calls in a launch that is not killed
                hook = functools.partial(die_inside_a_save, rng.randint(1, 40))
                run = Run(folder, flags, processes, hook).start()
                inside += 1
            else:
                run = Run(folder, flags, processes).start()
                time.sleep(rng.uniform(0, duration(processes)))
                os.kill(run.children[rng.randrange(processes)].pid, signal.SIGKILL)
            codes = run.wait()
            after = newest_step(folder)
            # The other process of two ends by itself, in one line; or all was done before the kill.
            kind = run.kind(codes, lambda code: code in (-signal.SIGKILL, 0, 1, 143, -signal.SIGTERM))
            if kind == "tracebacks" and workers != "0" and run.output().rstrip().endswith("Connection reset by peer"):
                kind = ""  # of a worker's thread, which was about to hand a batch to the killed process
            if after < before:
                kind = "lost"
            counts.add(kind, f"chain {chain}, kill {kill}: {codes}, step {before} -> {after}: {run.output()[-400:]}")
            before = after
        run = Run(folder, flags, processes).start()
        kind = run.kind(run.wait(), lambda code: code == 0)
        note = differs(reference(processes), folder)
        counts.add(kind or ("wrong" if note else ""), f"chain {chain}'s end: {note or run.output()[-400:]}")
    counts.remark = f"{inside} of the kills inside a save; {counts.cases} = kills + resumed ends"
    return counts


def part_signals(quick: bool) -> Counts:
    """SIGTERM or SIGINT at a random moment, each second one twice, each third to the whole process group."""
    counts, rng, slowest = Counts(), random.Random(2), 0.0
    os.environ["TORTURE_MARK"] = str(work("mark"))
    for case in range(6 if quick else 60):
        number, twice = (signal.SIGTERM, signal.SIGINT)[case % 2], case % 4 > 1
        name = "SIGTERM" if number == signal.SIGTERM else "SIGINT"
        if case % 6 == 5:  # the command itself, from its imports on
            seconds = launched_and_stopped(number, twice, rng.uniform(0, 9), torchrun=case % 12 == 11)
            kind, note = seconds if isinstance(seconds, tuple) else ("", "")
            slowest = max(slowest, 0.0 if kind else seconds)
            counts.add(kind, f"train.py, {name}: {note}")
            continue
        processes, workers = (1, 1, 2)[case % 3], ("0", "2")[case // 6 % 2]
        mark = work("mark")
        mark.unlink(missing_ok=True)
        hook = None
        if case % 5 == 4:
            hook = functools.partial(die_inside_a_save, rng.randint(1, 60), number, twice)
        # The demo's own network; best and last checkpoint are saved after each evaluation.
        flags = ("--model-args", "k=2", "channels=(48,48,64,96)", "-b", "32", "--workers", workers, "--epochs", "500")
        run = Run(fresh("signals"), flags, processes, hook).start()
        if hook:
            while not mark.exists() and time.sleep(0.01) is None:
                pass
            time.sleep(0.01)
            sent = float(mark.read_text() or time.monotonic())
        else:
            time.sleep(rng.uniform(0, 2 * duration(processes)))
            sent = time.monotonic()
            started = "steps an epoch" in run.output()  # from then on one of two passes it on to the other
            for child in rng.sample(run.children, 1) if started else run.children:
                for _ in range(1 + twice):
                    (os.killpg if case % 3 == 1 else os.kill)(child.pid, number)
                    time.sleep(rng.choice([0, 0.05]))
        codes = run.wait(60)
        seconds = time.monotonic() - sent
        # A process that is not set up yet has no handler, or leaves alone: its neighbour then ends in one line.
        started = "steps an epoch" in run.output()
        allowed = {128 + number} if started or processes == 1 else {128 + number, -number, 1}
        allowed |= set() if started else {-number}
        kind = run.kind(codes, lambda code, allowed=allowed: code in allowed)
        if not kind and seconds > 10:
            kind = "hangs"
        if not kind and started and f"{name}: saved step {newest_step(run.folder)};" not in run.output():
            kind = "lost"
        slowest = max(slowest, seconds)
        counts.add(kind, f"case {case}, {name}: {codes} after {seconds:.1f} s: {run.output()[-400:]}")
    counts.remark = f"the slowest exit {slowest:.1f} s after the signal"
    return counts


def launched_and_stopped(number: int, twice: bool, delay: float, torchrun: bool) -> float | tuple[str, str]:
    """Seconds from a signal to the exit of `python train.py --recipe demo`, or what is wrong."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launch, "train.py", "--recipe", "demo", "--output-dir", str(fresh("demo"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(delay + 8 * torchrun)
    sent = time.monotonic()
    for _ in range(1 + twice):
        process.send_signal(number)
    try:
        out = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return "hangs", f"after {delay:.1f} s"
    seconds = time.monotonic() - sent
    saved = re.search(r"saved step (\d+);", out)
    if torchrun:  # torchrun has an exit code and a report of its own; what counts is the workers' checkpoint
        fine = not saved or newest_step(work("demo")) == int(saved[1])
    else:  # a shell calls both 143, or 130
        fine = process.returncode in (128 + number, -number) and "Traceback" not in out
        fine = fine and (saved is not None) == (newest_step(work("demo")) >= 0)
    if not fine:
        return ("tracebacks" if "Traceback" in out else "wrong"), f"{process.returncode} {out[-400:]}"
    return seconds if seconds < 10 else ("hangs", f"{seconds:.1f} s")


# --------------------------------------------------------------------------------------------- damaged checkpoints


def part_checkpoints(quick: bool) -> Counts:
    """1,000 changed files: refused by name, or exactly the content of the whole one."""
    run = Run(fresh("mutated"), ("--max-steps", "6")).start()
    assert run.wait() == [0], run.output()
    whole = (run.folder / "last.pt").read_bytes()
    expected = load_checkpoint(run.folder / "last.pt")
    path = work("mutated.pt")

    def judge(case: int) -> str:
        rng = random.Random(case)
        content, what = bytearray(whole), f"case {case}"
        must_refuse = False
        if case % 4 == 0:
            for _ in range(rng.choice([1, 1, 1, 2, 50])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif case % 4 == 1:
            length = rng.randrange(len(content))
            content = content[:length] if rng.random() < 0.7 else content[:length] + bytes(len(content) - length)
            must_refuse = bytes(content) != whole and len(content) < len(whole)
        elif case % 4 == 2:  # inside the archive, whose checksums are right: a record cut, gone, another's, or flipped
            def change(records: dict[str, bytes]) -> None:
                names = sorted(records)
                name = rng.choice(names[:3] + names)
                how = rng.randrange(4)
                if how == 0:
                    del records[name]
                elif how == 1:
                    records[name] = records[name][: rng.randrange(max(1, len(records[name])))]
                elif how == 2:
                    records[name] = records[rng.choice([n for n in names if len(records[n]) != len(records[name])])]
                else:
                    name = next(n for n in names if n.endswith("data.pkl"))
                    value = bytearray(records[name])
                    for _ in range(rng.choice([1, 2, 20])):
                        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
                    records[name] = bytes(value)

            content = rewritten(whole, change)
        else:
            what, content = changed_checkpoint(whole, rng)
            must_refuse = True
        path.write_bytes(content)
        if case % 40 >= 36:  # a tenth of each kind of change, to a run that is told to go on from it
            return judge_resume(path, what, must_refuse)
        found = refused(path, load_checkpoint, path)
        if found is None:
            return ""
        model = refused(path, load_model, found)
        if model is None:
            return ""
        if case % 4 == 2:  # with right checksums another content is as good as a checkpoint of another run
            return ""
        with contextlib.suppress(AssertionError):
            assert_same(found, expected)
            return f"wrong: accepted, {what}" if must_refuse else ""
        if must_refuse and what.startswith(("4", "0 optimizer", "1 optimizer")):
            return ""  # optimizer and state are no concern of load_model
        return f"wrong: accepted, {what}"

    def judge_resume(path: Path, what: str, must_refuse: bool) -> str:
        run = Run(fresh("resumed"), ("--resume", str(path), "--max-steps", "7")).start()
        codes = run.wait(60)
        kind = run.kind(codes, lambda code: code in (0, 1))
        if not kind and codes == [1] and not re.fullmatch(r"train\.py: [^\n]*\n", run.output()):
            kind = "wrong"
        if not kind and codes == [0] and must_refuse and not what.startswith(("5", "0 c", "0 n", "1 c", "1 n")):
            kind = "wrong"
        return f"{kind}: resumed {what}: {run.output()[-300:]}" if kind else ""

    return judged(range(100 if quick else 1000), judge, limit=60)


# ------------------------------------------------------------------------------------------- batch files, hostile


def part_batches(quick: bool) -> Counts:
    """500 changed batch files: refused by name, or what Python's own unpickler reads from the same bytes."""
    path = work("data_batch")
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    content = {b"batch_label": b"one", b"labels": [0, 9, 4, 4, 1, 7], b"data": rows, b"filenames": [b"a.png"] * 6}
    wholes = [pickle.dumps(content, protocol) for protocol in (2, 3, 4, 5)]

    def judge(case: int) -> str:
        rng = random.Random(case)
        changed = bytearray(wholes[case % 4])
        for _ in range(rng.choice([1, 1, 2, 10])):
            # Most of a file are pixels, where any byte is as good as any other: aim at the rest.
            at = rng.choice([rng.randrange(len(changed)), rng.randrange(300), len(changed) - 1 - rng.randrange(300)])
            changed[at] = rng.choice([changed[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        if rng.random() < 0.2:
            del changed[rng.randrange(len(changed)) :]
        path.write_bytes(changed)
        found = refused(path, read_batch, path, b"labels", 10)
        if found is None:
            return ""
        images, labels = found
        try:
            reference = pickle.loads(bytes(changed), encoding="bytes")
        except pickle.UnpicklingError:
            return ""  # the length of a frame, on which nothing depends
        pixels = torch.from_numpy(np.array(reference[b"data"]).reshape(-1, 3, 32, 32))
        same = torch.equal(images, pixels) and labels.tolist() == reference[b"labels"]
        return "" if same and images.dtype == torch.uint8 else f"wrong: case {case}, {images.shape}"

    return judged(range(50 if quick else 500), judge)


def part_pickles(quick: bool) -> Counts:
    """Files that would leave a canary: as a batch, as names, in a checkpoint, as the type of a tensor's storage."""
    canary, other, path = str(work("canary")), str(work("other.py")), work("hostile")
    Path(other).write_text(f"open({canary!r}, 'w').close()")
    np.save(other + ".npy", np.array([Touch(canary)], dtype=object))  # numpy.load unpickles it, if allowed to
    copyreg.add_extension("posix", "system", 240)
    whole = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(3)}}, whole)
    calls = hostile_calls(canary, other)
    cases = [(*calls[i % len(calls)], i) for i in range(12 if quick else 120)]

    def clear() -> None:
        for file in (canary, *map(str, work(".").glob("canary*"))):
            shutil.rmtree(file, ignore_errors=True)
            Path(file).unlink(missing_ok=True)

    def touched() -> bool:
        time.sleep(0.002)
        return bool(list(work(".").glob("canary*")))

    def judge(case: tuple) -> str:
        module, name, arguments, number = case
        forms = hostile_forms(module, name, arguments)
        form = list(forms)[number % len(forms)]
        body = forms[form]
        destination = number % 4
        clear()
        if destination == 0:
            path.write_bytes(b"\x80\x04}" + string("data") + body + b"s.")
            found = refused(path, read_batch, path, b"labels", 10)
        elif destination == 1:  # the file of the names
            folder = fresh("hostile_cifar")
            shutil.copytree(work("cifar"), folder)
            meta = folder / "cifar-10-batches-py" / "batches.meta"
            meta.write_bytes(b"\x80\x02}" + value(b"label_names") + body + b"s.")
            found = refused(meta, data.load_cifar, "cifar10", folder)
        else:
            if destination == 2:
                pickled = b"\x80\x02}" + string("state") + body + b"s."
            else:  # the type of a storage, in what the pickle says of a tensor
                pickled = b"\x80\x02(" + string("storage") + body + string("0") + string("cpu") + b"K\x03tQ."
            change = {"archive/data.pkl": pickled}
            path.write_bytes(rewritten(whole.getvalue(), lambda records: records.update(change)))
            found = refused(path, load_checkpoint, path)
        what = f"{form} {module}.{name} to {destination}"
        if touched():
            return f"canaries: {what}"
        return f"wrong: accepted, {what}" if found is not None else ""

    counts, armed = judged(cases, judge, limit=60), 0
    for module, name, arguments, number in cases:
        forms = list(hostile_forms(module, name, arguments).values())
        clear()
        armed += armed_in_a_child(forms[number % len(forms)], touched)
    clear()
    counts.remark = f"Python's own unpickler obeys {armed} of them"
    return counts


def armed_in_a_child(content: bytes, touched: Callable) -> bool:
    """Whether Python's unpickler does what the file asks for."""
    pid = os.fork()
    if pid == 0:
        os.chdir(FOLDER)  # some leave other files where they are
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        with contextlib.suppress(BaseException):
            pickle.loads(b"\x80\x04" + content + b".")
        time.sleep(0.01)  # for a command that is not waited for
        os._exit(0)
    os.waitpid(pid, 0)
    return touched()


# --------------------------------------------------------------------------------------------------------- images

def part_images(quick: bool) -> Counts:
    """Odd files with known pixels, or to be refused."""

    def judge(case: tuple) -> str:
        name, content, expected, tolerance = case
        path = work("images") / name
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
        found = refused(path, read_image, path)
        if found is None or expected is None:
            return "" if found is expected is None else f"wrong: {name} {'refused' if found is None else 'read'}"
        if found.dtype != torch.uint8 or found.shape != (3, *expected.shape[:2]):
            return f"wrong: {name}: {found.dtype} {tuple(found.shape)}"
        off = np.abs(found.permute(1, 2, 0).numpy().astype(float) - expected).max()
        return "" if off <= tolerance else f"wrong: {name}: off by {off}"

    work("images").mkdir(exist_ok=True)
    os.mkfifo(work("images") / "pipe.png")
    counts = judged(odd_images(), judge)
    for name in ("nothing.png", "pipe.png"):
        path = work("images") / name
        one = judged([path], lambda path: "" if refused(path, read_image, path) is None else f"wrong: {path}", limit=5)
        counts.cases, counts.hangs, counts.wrong = counts.cases + 1, counts.hangs + one.hangs, counts.wrong + one.wrong
    return counts


def part_fuzz(quick: bool) -> Counts:
    """2,000 mutations of valid images: pixels, or a refusal."""
    seeds = [content for _, content, expected, _ in odd_images() if content and expected is not None]

    def judge(case: int) -> str:
        rng = random.Random(case)
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 2, 5, 30])):
            at = rng.choice([rng.randrange(len(content)), rng.randrange(min(120, len(content)))])
            how = rng.randrange(4)
            if how < 2:
                content[at] = rng.choice([content[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255])
            elif how == 2:
                content[at:at] = content[at : at + rng.randrange(20)] or b"\0"
            else:
                del content[at : at + rng.randrange(20)]
            content = content or bytearray(b"\0")
        if content.startswith(PNG) and rng.random() < 0.7:
            content = with_right_sums(content)  # else its checksums let nothing through
        path = work("fuzz.image")
        path.write_bytes(content)
        found = refused(path, read_image, path)
        if found is None or (found.dtype == torch.uint8 and found.ndim == 3 and len(found) == 3 and found.numel()):
            return ""
        return f"wrong: case {case}: {found.dtype} {tuple(found.shape)}"

    return judged(range(200 if quick else 2000), judge)


# ------------------------------------------------------------------------------------------ disks, workers, memory


def part_machine(quick: bool) -> Counts:
    """Full disks, folders that cannot be written, dying workers, too little memory, numbers that overflow."""
    counts = Counts()

    def one_line(name: str, run: Run, *fragments: str, step: int | None = None, before_training: bool = False) -> None:
        """The run ends with exit code 1 and one line that says why, and its newest checkpoint is still there."""
        kind = run.kind(run.wait(), lambda code: code == 1)
        lines = [line for line in run.output().splitlines() if line.startswith("train.py: ")]
        fits = len(lines) == 1 and all(fragment in lines[0] for fragment in fragments)
        if not kind and (not fits or (before_training and "steps an epoch" in run.output())):
            kind = "wrong"
        if not kind and step is not None and newest_step(run.folder) < step:
            kind = "lost"
        counts.add(kind, f"{name}: {run.output()[-600:]}")

    def ends_well(name: str, run: Run) -> None:
        kind = run.kind(run.start().wait(), lambda code: code == 0)
        note = differs(reference(1), run.folder)
        counts.add(kind or ("wrong" if note else ""), f"{name}: {note} {run.output()[-400:]}")

    # A file may not grow beyond half a checkpoint: the write fails in the kernel.
    folder = fresh("limit")
    run = Run(folder, hook=functools.partial(stop_at, (5,))).start()
    assert run.wait() == [143], run.output()
    size = (folder / "last.pt").stat().st_size // 2
    go_on = ("--resume", "auto")
    limited = Run(folder, go_on, hook=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    one_line("file limit", limited.start(), "File too large", "--resume auto", step=5)
    ends_well("after the file limit", Run(folder, go_on))

    # A disk of so many bytes, full at another place in the run each time: it writes 200 kB and, at its fullest, holds
    # four checkpoints.
    if can_mount():
        for kilobytes in (1, 200, *(200 + checkpoints * 2 * size // 1024 for checkpoints in (1, 2, 3))):
            with mounted(f"size={kilobytes}k") as folder:
                run = Run(folder, go_on)
                one_line(f"disk of {kilobytes} kB", run.start(), "No space left", step=-1)
                subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
                ends_well(f"after the disk of {kilobytes} kB", run)
        with mounted("size=20m") as folder:  # room for two of the demo's checkpoints
            run = Run(folder, ("--model-args", "k=2", "channels=(48,48,64,96)"))
            one_line("disk of 20 MB", run.start(), "No space left", "--resume auto", step=1)
        with mounted("size=1m,ro") as folder:
            one_line("read-only", Run(folder).start(), "Read-only", before_training=True)
            one_line("read-only", Run(folder / "new").start(), "Read-only", before_training=True)
    else:
        counts.remark = "not root: no real disks; "

    work("file").write_text("")
    one_line("a file", Run(work("file")).start(), "file", before_training=True)
    folder = fresh("used")
    first = Run(folder, ("--epochs", "500")).start()
    while "steps an epoch" not in first.output():
        time.sleep(0.05)
    second = Run(folder, go_on)
    second_log = work("second.log")
    second.children = [Child(second_log, second.main, 0, 0)]
    codes = second.wait()
    fine = codes == [1] and re.fullmatch(r"train\.py: [^\n]*in use by another run\n", second_log.read_text())
    counts.add("" if fine else "wrong", f"in use: {codes} {second_log.read_text()}")
    os.kill(first.children[0].pid, signal.SIGTERM)
    counts.add(first.kind(first.wait(), lambda code: code == 143), f"first of two: {first.output()[-300:]}")

    # A data worker is killed while the run trains.
    rng = random.Random(3)
    for _ in range(2 if quick else 8):
        run = Run(fresh("worker"), ("--workers", "2", "--epochs", "500")).start()
        pid = run.children[0].pid
        time.sleep(rng.uniform(1, 3))
        while not (workers := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            time.sleep(0.001)
        with contextlib.suppress(OSError):
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
        # PyTorch looks after its workers every 5 seconds. One that had done its work may not be missed at all.
        if run.children[0].wait(8, kill=False) is None:
            os.kill(pid, signal.SIGTERM)
            counts.add(run.kind(run.wait(), lambda code: code == 143), f"idle worker: {run.output()[-400:]}")
        else:
            lines = [line for line in run.output().splitlines() if line.startswith("train.py: ")]
            kind = "tracebacks" if "Traceback" in run.output() else "" if len(lines) == 1 else "wrong"
            kind = "hangs" if run.children[0].orphans() else kind
            counts.add(kind, f"worker: {run.output()[-600:]}")

    # The kernel refuses memory; the loss overflows.
    def little_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), used + (250 << 20)))

    large = ("--model-args", "channels=(256,512,512,512)", "k=2", "-b", "64")
    one_line("memory", Run(fresh("memory"), large, hook=little_memory).start(), "out of memory", "--grad-accum-steps 2")
    run = Run(fresh("overflow"), ("--max-steps", "3")).start()
    assert run.wait() == [0], run.output()
    wild = ("--resume", "auto", "--override", "--lr", "1e30")
    one_line("overflow", Run(run.folder, wild).start(), "not finite", step=3)
    return counts


def can_mount() -> bool:
    if os.geteuid():
        return False
    try:
        with mounted("size=1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def mounted(options: str) -> Iterable[Path]:
    """A disk in memory."""
    folder = work("disk")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# ------------------------------------------------------------------------------------------------ evaluation, stall


def part_evaluation(quick: bool) -> Counts:
    """Every image counted once: sizes x batches x processes, against numpy; a class that no image has."""
    counts = Counts()
    for processes in (1, 2, 3):
        results = work(f"counted{processes}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [Child(work("counted.log"), count_all, rank, processes, port, results) for rank in range(processes)]
        codes = [child.wait() for child in children]
        if codes != [0] * processes:
            counts.add("hangs" if None in codes else "tracebacks", work("counted.log").read_text()[-500:])
            continue
        for size, batch, result in pickle.loads(results.read_bytes()):
            expected = by_numpy(size)
            same = result[:5] == expected[:5] and math.isclose(result[5], expected[5], rel_tol=1e-5)
            counts.add("" if same else "wrong", f"{size} images, batch {batch}, {processes} processes: {result}")
    return counts


def count_all(rank: int, processes: int, port: int, results: Path) -> None:
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}  # fmt: skip
    accelerator = train.Accelerator()
    assert accelerator.num_processes == processes
    found = [(size, batch, counted(accelerator, size, batch)) for size in SIZES for batch in BATCHES]
    if rank == 0:
        results.write_bytes(pickle.dumps(found))
    train.leave(accelerator)


def part_stall(quick: bool) -> Counts:
    """How long a save of fishnet99 with Adam's state takes, beside the 156 steps of batch 256 between two saves."""
    counts, answer = Counts(), work("stall.txt")
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:  # on a disk, where training writes
        code = Child(work("stall.log"), measure_stall, answer, folder).wait(300)
    if code != 0:
        counts.add("hangs" if code is None else "tracebacks", work("stall.log").read_text()[-500:])
        return counts
    size, save, step = map(float, answer.read_text().split())
    share = save / (save + 156 * step)
    counts.add("" if share < 0.035 else "wrong", f"{share:.2%}")
    counts.remark = f"{size / 1e6:.0f} MB in {save:.2f} s, a step {step:.1f} s: {share:.3%} of an epoch of 156 steps"
    return counts


def measure_stall(answer: Path, folder: str) -> None:
    """One part of 32 images stands for an eighth of a step of 256."""
    flags = ["--recipe", "baseline", "--data-dir", str(work("cifar")), "--output-dir", folder, "-b", "32"]
    args = train.parse_args(flags)
    run = train.make_run(args, train.make_accelerator(args))
    run.model.train()
    steps, saves = [], []
    for _ in range(2):
        run.sampler.seek(run.state.epoch)
        started = time.perf_counter()
        train.train_step(run, iter(run.loader), 0.01)
        steps.append(8 * (time.perf_counter() - started))
    for _ in range(7):
        started = time.perf_counter()
        train.save(run, "last.pt")
        saves.append(time.perf_counter() - started)
    size = (run.output_dir / "last.pt").stat().st_size
    answer.write_text(f"{size} {statistics.median(saves)} {steps[-1]}")


# ----------------------------------------------------------------------------------------------------------- main

PARTS = {
    "evaluation": part_evaluation, "images": part_images, "fuzz": part_fuzz, "batches": part_batches,
    "pickles": part_pickles, "checkpoints": part_checkpoints, "machine": part_machine, "resume": part_resume,
    "kills": part_kills, "signals": part_signals, "stall": part_stall,
}  # fmt: skip


def main() -> None:
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, table = time.monotonic(), []
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync takes no time
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as folder:
        FOLDER = Path(folder)
        work("cifar").mkdir()
        write_cifar10(work("cifar"), 16, 10)
        for name in args.only:
            began = time.monotonic()
            counts = PARTS[name](args.quick)
            seconds = time.monotonic() - began
            line = f"{name:<12} {counts.cases:>5} cases {counts.bad:>3} bad {seconds:>5.0f} s  {counts.remark}"
            print(line[:79], flush=True)
            for note in counts.notes:
                print(f"    {note}", flush=True)
            table.append((name, counts))
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes, {datetime.date.today()}, Python "
          f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}\n")
    print("| part | cases | wrong | tracebacks | hangs | canaries | lost | remark |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, c in table:
        numbers = " | ".join(map(str, (c.wrong, c.tracebacks, c.hangs, c.canaries, c.lost)))
        print(f"| {name} | {c.cases:,} | {numbers} | {c.remark} |")
    sys.exit(any(c.bad for _, c in table))


if __name__ == "__main__":
    main()
