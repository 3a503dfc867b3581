"""A server under test: started, waited for, asked over HTTP, and ended with all its processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REQUEST_SECONDS = 300


class ServerError(RuntimeError):
    """A server that did not come up, with the last line that it wrote."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process that listens at `port`; what it writes goes to `log`."""

    def __init__(self, command: Sequence[str | Path], port: int, log: Path, environment: Mapping[str, str]):
        self.port, self.log = port, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises `ServerError` where it ends before, or takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ended with {self.process.returncode}: {self.last_line()}")
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5),
            ):
                return
            time.sleep(0.5)
        raise ServerError(f"no answer within {seconds:.0f} s: {self.last_line()}")

    def last_line(self) -> str:
        return (self.text().strip().splitlines() or ["it wrote nothing"])[-1][-300:]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def _request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        with urllib.request.urlopen(self._request(path, body), timeout=REQUEST_SECONDS) as response:
            return json.load(response)

    def stream(self, path: str, body: Mapping[str, Any]) -> list[tuple[float, Any]]:
        """(seconds on the clock, content) of each event."""
        events = []
        with urllib.request.urlopen(self._request(path, {**body, "stream": True}), timeout=REQUEST_SECONDS) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    events.append((time.monotonic(), json.loads(line[len(b"data: ") :])))
        return events

    def stop(self) -> None:
        for ending, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):  # children that outlived it
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path],
    port: int,
    log: Path,
    *,
    seconds: float,
    tries: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers. `seconds`: for each of the tries to start it."""
    for number in range(tries):
        server = Server(command, port, log, environment or {})
        try:
            server.wait(seconds)
            break
        except ServerError:
            server.stop()
            if number + 1 == tries:
                raise
    try:
        yield server
    finally:
        server.stop()
