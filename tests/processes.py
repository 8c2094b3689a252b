"""slicer's command in processes of its own, for the tests that kill it or let several work side by side.

Python needs several seconds to import torch, transformers and peft, and these tests start dozens of processes. So one
process imports them once, and each command is a fork of it. It runs as `python -m slicer` does, and it is on the CPU,
because a fork cannot use CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# What the commands import, apart from slicer: `heal` trains with the last ones.
MODULES = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.generation.utils", "datasets", "matplotlib.pyplot",
)  # fmt: skip
EVALUATION = (*MODULES, "lm_eval.models.huggingface", "lm_eval.evaluator")
TRAINING = (*MODULES, "peft", "transformers.trainer", "bitsandbytes", "accelerate")
VLLM = ("vllm", "vllm.v1.engine.core")
status: list[int] = []  # with which this process ends, once it is known


@dataclass
class Run:
    """One running command; `output` and `errors` are the files of what it writes."""

    server: ForkServer
    pid: int
    output: Path
    errors: Path
    code: int | None = None

    def poll(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        if self.code is None:
            self.code = self.server.ask(poll=self.pid)
        return self.code

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < until, f"still running after {timeout} s"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal and wait; returns the exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self.wait()

    def kill_held(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal where the process waits (`hold` of `start`); returns the exit status."""
        return self.kill_when((self.output.parent / "held").exists, number)

    def kill_when(
        self, there: Callable[[], object], number: signal.Signals = signal.SIGKILL, timeout: float = 120
    ) -> int:
        """Send the signal as soon as `there()` is true; returns the exit status."""
        until = time.monotonic() + timeout
        while not there():
            assert self.poll() is None, f"ended before it could be killed: {self.errors.read_text()[-3000:]}"
            assert time.monotonic() < until, f"nothing to see after {timeout} s"
            time.sleep(0.002)
        return self.kill(number)

    def succeeds(self) -> None:
        assert self.wait() == 0, self.errors.read_text()[-3000:]


class ForkServer:
    """The process that is forked; started when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None

    def start(
        self,
        *arguments: object,
        modules: tuple[str, ...] = MODULES,
        environment: Mapping[str, str] | None = None,
        script: Path | None = None,
        hold: tuple[str, str] | None = None,
    ) -> Run:
        """`slicer *arguments`, or a script with them.

        `hold` is an event that Python audits, such as "open" or "os.rename", and part of an argument of it: the
        process waits there, to be killed.
        """
        place = Path(tempfile.mkdtemp(dir=self._directory))
        output, errors = place / "output", place / "errors"
        pid = self.ask(
            arguments=[str(a) for a in arguments],
            modules=modules,
            environment=dict(environment or {}),
            script=script and str(script),
            hold=hold,
            directory=os.getcwd(),
            output=str(output),
            errors=str(errors),
        )
        return Run(self, pid, output, errors)

    def start_group(self, count: int, *arguments: object, **given: Any) -> list[Run]:
        """The same command in `count` processes that find each other, by the environment that torchrun sets."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0",
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        shared |= given.pop("environment", {})
        return [
            self.start(*arguments, environment={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **given)
            for r in range(count)
        ]

    def ask(self, **request: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that is forked ended with {self._process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        """End it, and what still runs of the commands."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Answer requests from stdin, a JSON object a line."""
    gc.set_threshold(50_000, 20, 20)
    atexit.register(leave)  # first, so it is called last
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, wait_status = os.waitpid(request["poll"], os.WNOHANG)
            alive.discard(pid)
            answer = os.waitstatus_to_exitcode(wait_status) if pid else None
        else:
            for name in ("slicer.cli.main", *request["modules"]):
                importlib.import_module(name)
            gc.freeze()  # no collection in a fork copies what was imported
            answer = os.fork()
            if answer == 0:
                run(request)
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    status.append(0)


def run(request: dict[str, Any]) -> NoReturn:
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    flags = os.O_WRONLY | os.O_CREAT
    opened = (os.open(os.devnull, os.O_RDONLY), os.open(request["output"], flags), os.open(request["errors"], flags))
    for number, descriptor in enumerate(opened):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["hold"] is not None:
        wait_at(*request["hold"], mark=Path(request["output"]).with_name("held"))
    script = request["script"]
    sys.argv = [script or "slicer", *request["arguments"]]
    try:
        if script is None:
            runpy.run_module("slicer", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
        status.append(0)
    except SystemExit as end:
        status.append(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        status.append(1)
    sys.exit()


def leave() -> None:
    """The last of what Python does at exit: the modules need no tearing down, which takes long."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def wait_at(event: str, part: str, mark: Path) -> None:
    """Let this process touch `mark` and sleep at the first `event` that has `part` in an argument."""
    waited = False

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal waited
        if name == event and not waited and any(part in str(argument) for argument in arguments):
            waited = True
            mark.touch()
            time.sleep(600)

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.path[0] = ""  # as in `python -m slicer`, not this file's directory
    serve()
