"""Runs a vLLM server as a child process: starts it, waits until it is ready, reports why it ended, and stops it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from slicer.checkpoint import hub
from slicer.errors import ServeError
from slicer.serve.settings import environment, prepare, require_vllm

_POLL_SECONDS = 0.25
_GRACE_SECONDS = 20.0
# no proxy between slicer and its own child process
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Messages of vLLM's parent process when a child fails, which do not contain the reason.
_HOLLOW = re.compile(
    r"Engine core initialization failed|Engine process failed to start|EngineCore failed|See root cause above"
    r"|EngineDeadError|Executor failed|WorkerProc initialization failed|CancelledError|KeyboardInterrupt|SystemExit"
)
_ENGINE_DIED = re.compile(rb"EngineDeadError|Engine core proc \S+ died|died unexpectedly")  # a worker of the API server
_KILLED = re.compile("exit ?code:? -9|SIGKILL")
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((ERROR|CRITICAL|WARNING|INFO) [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")
_REASON = re.compile(
    r"^(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)|^(?:vllm|[\w.]+py).*?\berror: (.+)|^\s*Value error, (.+)"
)
# What vLLM logs when it has come to a stage, the last one first.
_STAGES = (
    (b"Starting vLLM server", "Opening the endpoint"),
    (b"KV cache size", "Warming up"),
    (b"Loading weights took", "Warming up"),
    (b"Starting to load model", "Loading weights"),
    (b"Initializing a V1", "Starting the engine"),
)


class Server:
    """A context manager around `vllm serve`: enters when `/health` answers, and stops all child processes on exit.

    Attributes:
        base_url: the endpoint for OpenAI clients, such as "http://127.0.0.1:8000/v1".
        model: the model name for clients.
        api_key: the key that clients must send, or None.
        notes: default settings chosen for this model and machine.
        log: the file with vLLM's output.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        name: str | None = None,
        draft: str | Path | None = None,
        speculative_tokens: int = 3,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        timeout: float = 1800,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """`source` and `draft` as the source of `slicer convert`; `arguments` are vLLM's own flags.

        Port 0 means a free one. `variables` are added to the environment; `timeout` is in seconds. Raises ServeError or
        SourceError for invalid settings, before starting anything.
        """
        require_vllm()
        self.host, self.api_key, self._timeout = host, api_key, timeout
        self._report = progress or (lambda _: None)
        path = hub.resolve(str(source)).path
        drafted = None if draft is None else hub.resolve(str(draft)).path
        self.settings = prepare(path, drafted, speculative_tokens, tuple(arguments))
        self.notes = self.settings.notes
        self.model = name or (str(source) if not Path(str(source)).exists() else Path(source).resolve().name)
        self.port = _claim(host, port)
        self._variables = dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self.log = Path(tempfile.gettempdir()) / f"slicer-serve-{os.getpid()}-{secrets.token_hex(3)}.log"

    @property
    def base_url(self) -> str:
        """The OpenAI endpoint, as seen from this machine."""
        return f"{self.root_url}/v1"

    @property
    def root_url(self) -> str:
        """The server's root URL, as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of vLLM's API server."""
        assert self._process is not None
        return self._process.pid

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None or not issubclass(kind, ServeError):
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Server:
        """Start vLLM and return when it is ready. Raises ServeError with vLLM's own reason."""
        command = [
            *(sys.executable, "-m", "slicer.serve.launch", "serve", str(self.settings.path)),
            *("--host", self.host, "--port", str(self.port), "--served-model-name", self.model),
            *self.settings.arguments,
        ]
        variables = os.environ | environment(self.settings) | self._variables
        variables.pop("VLLM_API_KEY", None)
        if self.api_key:
            variables["VLLM_API_KEY"] = self.api_key  # not on the command line, which other users can read
        self._output = open(self.log, "wb")  # noqa: SIM115
        os.chmod(self.log, 0o600)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # one process group, so that all children can be stopped together
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            self._await_health()
        except BaseException as error:
            self.__exit__(type(error))  # stopped by the user: the log is not needed
            raise
        return self

    def _await_health(self) -> None:
        deadline = time.monotonic() + self._timeout
        shown = ""
        while not self.healthy():
            if self._process is not None and self._process.poll() is not None:
                raise ServeError(f"vLLM did not start: {self.reason()}")
            if time.monotonic() > deadline:
                raise ServeError(
                    f"vLLM was not ready after {self._timeout:.0f} s; see {self.log}, or pass a longer --timeout"
                )
            if (stage := self._stage()) != shown:
                shown = stage
                self._report(stage)
            time.sleep(_POLL_SECONDS)

    def healthy(self, timeout: float = 2.0) -> bool:
        """Whether `/health` answers with 200."""
        try:
            with DIRECT.open(f"{self.root_url}/health", timeout=timeout) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    def wait(self) -> None:
        """Block until the server exits; raises ServeError with the reason."""
        assert self._process is not None
        silent = 0
        while True:
            try:
                self._process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                # The API server may survive its engine; one that is only busy answers within a minute.
                dead = _ENGINE_DIED.search(self._tail(8192)) or not self.healthy(timeout=10.0)
                silent = silent + 1 if dead else 0
                if silent < 6:
                    continue
            raise ServeError(f"vLLM stopped: {self.reason()}")

    def stop(self) -> None:
        """Stop vLLM and all its child processes; does nothing if it is not running."""
        process, self._process = self._process, None
        if process is not None:
            with _undisturbed():
                _end(process)
        if self._output is not None:
            self._output.close()
            self._output = None

    def reason(self) -> str:
        """Why vLLM ended, from its log, as one line."""
        code = None if self._process is None else self._process.poll()
        lines = self._tail(400_000).decode("utf-8", "replace").splitlines()
        found = [m for line in lines if (m := _REASON.match(_PREFIX.sub("", line))) and not _HOLLOW.search(m.string)]
        at = f"; the log is {self.log}"
        if found:
            last = found[-1]
            kind, text = last[1], (last[2] or last[3] or last[4]).strip()
            if kind == "ValidationError":  # pydantic writes the reason on a separate line
                text = next((m[4] for m in reversed(found) if m[4]), text)
            plain = kind in (None, "ValueError", "RuntimeError", "ValidationError", "AssertionError", "OSError")
            return _shorten(text if plain else f"{kind}: {text}") + at
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or any(_KILLED.search(line) for line in lines[-200:]):
            return f"a process was killed, probably out of memory: lower --max-model-len or the KV cache{at}"
        if any(_HOLLOW.search(line) for line in lines):
            return f"its engine process ended without a message (killed, or out of memory){at}"
        return f"exit code {code}{at}"

    def _tail(self, size: int) -> bytes:
        with contextlib.suppress(OSError), open(self.log, "rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - size))
            return stream.read()
        return b""

    def _stage(self) -> str:
        """The current startup stage, from the log."""
        tail = self._tail(200_000)
        return next((stage for mark, stage in _STAGES if mark in tail), "Starting vLLM")


def _shorten(text: str) -> str:
    text = re.sub(r"\s*\[type=.*$", "", " ".join(text.split()))
    return text if len(text) <= 400 else text[:397] + "..."


def _claim(host: str, port: int) -> int:
    """Check and return the port, or a free one for 0. Raises ServeError if it is in use or the host is not local."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if port:
            raise ServeError(
                f"{host}:{port}: cannot listen ({error.strerror or error}); choose another --port or --host"
            ) from None
        raise ServeError(f"{host}: not local ({error.strerror or error}); pass another --host") from None


def _die_with_parent() -> None:
    """In the child: get SIGTERM when slicer dies without stopping it (Linux prctl)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    group = process.pid  # start_new_session made it the leader
    for number, patience in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGTERM, 5.0)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C while stopping, so that no processes are left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
