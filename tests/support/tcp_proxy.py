"""A TCP proxy in front of a server, which can be told to be late, to break, to garble and to swallow. Threads, no event loop: it
serves blocking clients and asyncio alike."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from contextlib import suppress


class TcpProxy:
    """Faults act on what is forwarded from the moment they are set."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.delay_s = 0.0  # of each piece of an answer
        self.garble: tuple[bytes, bytes] | None = None  # the next piece of an answer with the first has the second in its place
        self.swallows: set[bytes] = set()  # requests that begin so never reach the server
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        proxy = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                client: socket.socket = self.request
                with socket.create_connection(target) as server:
                    proxy._pairs.add((client, server))
                    upwards = threading.Thread(target=proxy._forward_requests, args=(client, server), daemon=True)
                    upwards.start()
                    proxy._forward_answers(server, client)
                    proxy._pairs.discard((client, server))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, allow_reuse_address = True, True

        self._server = Server(("127.0.0.1", 0), Connection)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def cut(self) -> None:
        """Break every connection there is."""
        for pair in list(self._pairs):
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._server.shutdown()
        self._server.server_close()

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        swallowing = False
        with suppress(OSError):
            while data := client.recv(65_536):
                swallowing = swallowing or any(data.startswith(request) for request in self.swallows)
                if not swallowing:
                    server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _forward_answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65_536):
                time.sleep(self.delay_s)
                if self.garble and self.garble[0] in data:
                    data, self.garble = data.replace(*self.garble, 1), None
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
