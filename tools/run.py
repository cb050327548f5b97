"""What surrounds a training loop: its folder, checkpoints, resuming, signals, several processes.

`Run` is used as an iterator by train.py, tools/segmenter.py and tools/make_toy.py. A reader of the
paper can skip this file.
"""
import fcntl
import json
import os
import signal
import sys
import time
import zipfile
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from aldm import check_finite, pick_device
from data import InputError
from tools.command import guard_streams
from tools.files import atomic, remove_leftovers, write_text

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A run cannot continue. Its text is one line that says why."""


class Run:
    """The folder of a training, and its loop: resumes, logs, saves checkpoints, stops cleanly.

        with Run(args, state, meta, columns) as run:
            for step in run:            # from the newest checkpoint's step to args.steps
                batch = run.next(stream)
                ...
                run.log(losses)         # a row of log.csv; a checkpoint when one is due
                if run.saved:
                    ...                 # export what users take from the run

    args     out, steps, seed, resume, save_every and keep
    state    {name: module or optimiser}: all that a checkpoint holds
    meta     plain values that a resumed run must share
    columns  of log.csv; those that end with "dropped" tell whether an update was left out

    first: the step to start from; done: steps done; did: those done by this process; saved: whether
    the last step was followed by a checkpoint. A resumed run repeats the steps after its checkpoint
    and gives the same result, on one CPU thread bit for bit. Raises InputError if the folder is in
    use, holds a run that is not to be resumed, or one that differs in `meta`.
    """

    def __init__(self, args, state, meta, columns):
        self.args = args
        self.state = state
        self.meta = meta
        self.columns = columns
        self.out = Path(args.out)
        self.saved = False
        self.newest = "none"  # the last good checkpoint; known on rank 0
        self.signals = []
        self.stream = None
        self.stop = 0  # the number of a signal after which the run ends
        self.handlers = {}

    def __enter__(self):
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.folder = lock_folder(self.out)
            try:
                refuse_second_run(self.args)
                remove_leftovers(self.out)
                self.first = self.load()
            except BaseException:
                os.close(self.folder)
                raise
            largest(0)
        else:  # the others wait for that
            largest(0)
            self.first = self.load()
        self.done = self.first
        self.table = Log(self.out / "log.csv", self.columns, self.first)
        return self

    def __iter__(self):
        self.handlers = catch_signals(self.note_signal)
        self.began = time.time()
        self.bar = tqdm(total=self.args.steps, initial=self.first, disable=rank() > 0,
                        mininterval=1)
        with self.bar:
            for step in range(self.first, self.args.steps):
                # All randomness of a step comes from its number, so that a resumed run repeats it.
                torch.manual_seed(hash((self.args.seed, step, rank())) % 2 ** 63)
                yield step
                if self.stop:
                    break
        restore_signals(self.handlers)
        if self.stop:
            note(f"stopped at step {self.done}; continue with --resume")
            raise SystemExit(128 + self.stop)

    def __exit__(self, kind, error, traceback):
        restore_signals(self.handlers)
        if hasattr(self.stream, "close"):  # a generator: this ends its loading processes
            self.stream.close()
        if rank() == 0:
            os.close(self.folder)
        expected = (Stopped, InputError, OSError, SafetensorError, torch.OutOfMemoryError)
        if self.handlers and isinstance(error, expected):
            reason = " ".join(str(error).split())
            if rank() == 0:
                reason += f"; last good checkpoint: {self.newest}"
            raise Stopped(reason) from None

    @property
    def did(self):
        return self.done - self.first

    @property
    def seconds(self):
        """Seconds of this process's steps."""
        return self.ended - self.began

    def note_signal(self, which, frame):
        """The first signal stops the run after its step, the second one at once."""
        if self.signals:
            os._exit(128 + which)
        self.signals.append(which)

    def next(self, stream):
        """The next batch. If any process cannot read its own, all save and stop."""
        self.stream = stream
        batch = None
        trouble = "another process was stopped"
        try:
            batch = next(stream)
        except InputError as error:  # an image that is no longer readable
            trouble = error
        if largest(int(batch is None)):
            if self.did:
                self.table.flush()
                self.save()
            largest(0)  # no process ends before the checkpoint is written
            raise Stopped(f"step {self.done}: {trouble}")
        return batch

    def due(self, every):
        """Whether the current step is a multiple of `every`, or the last; on rank 0 only."""
        done = self.done + 1
        return rank() == 0 and (done % every == 0 or done == self.args.steps)

    def log(self, losses):
        """Count the step as done: {name: scalar} becomes a row of log.csv; save when due.

        Raises Stopped if too many updates were dropped, or the last one of the run."""
        self.done += 1
        self.ended = time.time()
        self.saved = False
        self.table.add(self.done, losses)
        self.bar.update()
        self.bar.set_postfix(self.table.last, refresh=False)
        self.stop = largest(max(self.signals, default=0))
        at_end = self.done == self.args.steps
        if at_end or self.stop or self.done % self.args.save_every == 0:
            was_dropped = self.table.flush(at_end)
            if self.stop or not was_dropped:
                self.save()
            largest(0)  # no process ends before the checkpoint is written

    def save(self):
        """Write a checkpoint, and keep the newest --keep."""
        if rank() > 0:
            return
        content = {"step": self.done, "meta": self.meta, "flags": flags_of(self.args)}
        for name, part in self.state.items():
            content[name] = part.state_dict()
            if isinstance(part, torch.nn.Module):
                check_finite(content[name], f"step {self.done}: {name}")
        path = self.out / f"checkpoint_{self.done:07d}.pt"
        with atomic(path) as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # torch's report of a full disk
                raise OSError(f"{path}: cannot be written, is the disk full? ({error})") from None
        self.newest = path
        older = [p for p in checkpoints(self.out) if p <= path]  # later ones are damaged
        for path in older[:-self.args.keep]:
            path.unlink()
        self.saved = True

    def load(self):
        """Fill `state` from the newest whole checkpoint -> its step, or 0 if there is none.

        Raises InputError if the run has other settings or more steps, or every checkpoint is
        damaged."""
        if not self.args.resume:
            return 0
        damaged = []
        for path in reversed(checkpoints(self.out)):
            try:
                saved = read_checkpoint(path)
            except Exception:  # both libraries raise many kinds of errors for damaged files
                damaged.append(str(path))
                continue
            self.check_settings(path, saved)
            self.fill(path, saved)
            if damaged:
                note(f"{', '.join(damaged)}: damaged; going back to {path.name}")
            self.newest = path
            return saved["step"]
        if damaged:
            raise InputError(f"{damaged[0]}: damaged, as are all checkpoints; choose another --out")
        note(f"{self.out}: nothing to resume, starting at step 0")
        return 0

    def fill(self, path, saved):
        """Fill `state` from a checkpoint. Raises InputError if it is of other networks."""
        try:
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
                if isinstance(part, torch.optim.Optimizer):
                    match_strides(part)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: from another kind of training; choose another "
                             "--out") from None

    def check_settings(self, path, saved):
        """Raise InputError if the run was started with another `meta`; note differing flags."""
        for key, value in self.meta.items():
            found = saved["meta"].get(key, value)
            if found != value and key != "dataset":  # a folder may have moved: its classes count
                raise InputError(f"{path}: the run was started with {key} {found!r:.60}, not "
                                 f"{value!r:.60}; resume with the same flags, or choose another "
                                 "--out")
        if saved["step"] > self.args.steps:
            raise InputError(f"--steps {self.args.steps}: {path} is already past that; use more")
        new = flags_of(self.args)
        differ = [f"{name} {value}, now {new[name]}" for name, value in saved["flags"].items()
                  if value != new.get(name, value)]
        if differ:
            note(f"{path}: the run was started with {'; '.join(differ)}")


def lock_folder(out):
    """Lock a folder for as long as the returned file descriptor is open. Raises InputError if
    another run has locked it."""
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"{out}: another run is writing here; choose another --out") from None
    except OSError as error:  # some network file systems have no locks on folders
        note(f"{out}: cannot be locked ({error.strerror}); start no second run here")
    return folder


def refuse_second_run(args):
    """InputError if --out holds a run that is not to be resumed."""
    out = Path(args.out)
    if not args.resume and (checkpoints(out) or (out / "log.csv").exists()):
        raise InputError(f"{out}: holds a run; continue it with --resume, or choose another --out")


def checkpoints(out):
    return sorted(Path(out).glob("checkpoint_" + "[0-9]" * 7 + ".pt"))


def read_checkpoint(path):
    """-> what a checkpoint holds. Raises any exception if it is damaged or not written by Run."""
    with zipfile.ZipFile(path) as file:  # torch.load does not verify the checksums
        if file.testzip():
            raise ValueError("a bad checksum")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    plain = isinstance(saved["meta"], dict) and isinstance(saved["flags"], dict)
    if not plain or type(saved["step"]) is not int or saved["step"] < 0:
        raise ValueError("no checkpoint of a run")
    return saved


def match_strides(optimizer):
    """Lay the moments out in memory like their weights, as the fused kernels require: a checkpoint
    may come from a device for which `make_fast` chose another layout."""
    for p, moments in optimizer.state.items():
        for name, t in moments.items():
            if name != "step":
                moments[name] = torch.empty_like(p).copy_(t)


# Flags that a resumed run may change without a word. (Where rates fall until the end of the run,
# --steps changes them.)
MAY_CHANGE = {"root", "out", "workers", "cache", "device", "recompute", "compile", "resume",
              "steps", "save_every", "keep", "sample_every", "adapter_dtype", "eval", "before",
              "test", "starts_below", "data"}


def flags_of(args):
    """All other flags, as plain values: a resumed run names those that differ."""
    return {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}


class Log:
    """log.csv, a row per step. On a GPU it is written ten rows at a time, since reading a loss
    makes the CPU wait."""

    def __init__(self, path, columns, first):
        self.path = path
        self.columns = columns
        self.waiting = []  # steps and losses that are not written yet
        self.last = {}  # the newest value of each loss
        self.dropped = deque(maxlen=100)  # for each step, whether an update was dropped
        rows = [",".join(["step", *columns])]
        if path.exists():  # from a resumed run: the steps after its checkpoint are repeated
            done = {str(step) for step in range(1, first + 1)}
            for row in path.read_text(errors="replace").splitlines():
                cells = row.split(",")
                if cells[0] in done and len(cells) == len(columns) + 1:
                    rows.append(row)
        if rank() == 0:
            write_text(path, "\n".join(rows) + "\n")

    def add(self, step, losses):
        self.waiting.append((step, losses))
        if len(self.waiting) == 10 or losses["dropped"].device.type == "cpu":
            self.flush()

    def flush(self, at_end=False):
        """Write the waiting rows -> whether an update of the last step was dropped. Raises Stopped
        if ten of the last hundred were, or, at the end of a run, the last one."""
        rows = []
        for step, losses in self.waiting:
            values = {name: value.item() for name, value in losses.items()}
            cells = [f"{values[name]:.7g}" if name in values else "" for name in self.columns]
            rows.append(",".join([str(step), *cells]) + "\n")
            drops = [name for name in values if name.endswith("dropped")]
            self.dropped.append(any(values.pop(name) for name in drops))
            self.last |= values
        self.waiting.clear()
        if rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(rows)
        count = sum(self.dropped)
        if count >= 10 or (at_end and self.dropped[-1]):
            raise Stopped(f"{count} of the last {len(self.dropped)} steps had losses or gradients "
                          f"that were not finite; see the columns dropped in {self.path}")
        return self.dropped[-1]


# -- JSON files, signals, processes, errors --------------------------------------------------------


def read_json(path):
    """-> the dict that a JSON file holds, or None if there is none or it cannot be read."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def catch_signals(handler):
    """Call handler(number, frame) at SIGNALS, except those that the process ignores, such as SIGHUP
    under nohup -> the handlers so far, for restore_signals."""
    return {which: signal.signal(which, handler) for which in SIGNALS
            if signal.getsignal(which) != signal.SIG_IGN}


def restore_signals(handlers):
    for which, handler in handlers.items():
        signal.signal(which, handler)


def note(text):
    """Print a line to stderr, once for all processes."""
    if rank() == 0:
        print(text, file=sys.stderr)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors):
    """Mean over the processes, in place, in one message for all tensors."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def largest(value):
    """The largest of the processes' numbers. All processes wait here, but no GPU does."""
    value = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def start_processes(args):
    """Join the other processes, if torchrun has started this one."""
    if "RANK" not in os.environ:
        return
    missing = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise InputError(f"RANK is set in the environment without {', '.join(sorted(missing))}; "
                         "start with torchrun, or unset RANK")
    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    if args.device != "cpu":
        args.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")


def end_processes():
    """Leave the processes' group. One that ends first, while rank 0 still judges, may otherwise
    abort as Python exits, and torchrun then stops rank 0."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_command(name, main):
    """Run a command line. An expected error becomes one line on stderr and an exit code: 2 for
    wrong input, 1 for a run that could not continue. A signal ends it after cleaning up, with
    128 + its number."""
    guard_streams()
    handlers = catch_signals(end_program)
    try:
        main()
    except InputError as error:
        code = 2
        text = str(error)
    except OSError as error:
        code = 2
        text = " ".join(str(error).split())
    except (Stopped, torch.OutOfMemoryError, MemoryError) as error:
        code = 1
        text = " ".join(str(error).split()) or "out of memory"
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch reports a CPU without memory
            raise
        code = 1
        text = "out of memory; use a smaller --batch or --size"
    except SystemExit:  # a run that a signal has stopped
        end_processes()
        raise
    else:
        end_processes()
        return
    finally:
        restore_signals(handlers)
    print(f"{name}: {text}", file=sys.stderr)
    raise SystemExit(code)


def end_program(which, frame):
    raise SystemExit(128 + which)
