"""A TCP proxy for tests: passes bytes on, later or not at all, swallows the answers, or cuts every connection."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time


class Proxy:
    """Listens on a port of its own and forwards to `target`, "host:port".

    delay: seconds that everything takes, each way. requests, answers: while cleared, nothing passes that way; it is
    kept until it may pass, or lost if the connection is cut first.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay = 0.0
        self.requests, self.answers = threading.Event(), threading.Event()
        self.requests.set()
        self.answers.set()
        self.swallow_answers = False
        self.swallowed = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._pairs.append((near, far))
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        gate = self.answers if answers else self.requests
        threading.Thread(target=self._pass_on, args=(under_way, sink, gate), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.swallow_answers:
                    self.swallowed.set()
                else:
                    under_way.put((time.monotonic() + self.delay, data))
        under_way.put((0.0, b""))
        source.close()

    def _pass_on(self, under_way: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket, gate: threading.Event):
        with contextlib.suppress(OSError):
            while (item := under_way.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                gate.wait()
                sink.sendall(item[1])
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Ends every connection that is open now; new ones are accepted."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()
        self.requests.set()
        self.answers.set()
