"""Serves the policy over HTTP from forked workers, which answer in threads and follow every version.

POST an observation, four numbers in JSON: the answer has the action, and the version that chose it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from policy import make_policy

import wsync


def work(listening: socket.socket) -> None:
    policy = make_policy().eval()
    reader = wsync.attach(policy, "cartpole")  # after the fork: each worker has a reader of its own

    def follow() -> None:
        while reader.wait():
            reader.refresh()  # waits for the requests that are under way

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            observation = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with reader.using() as version, torch.inference_mode():  # one version for the whole request
                action = int(policy(torch.tensor(observation)).argmax())
            answer = json.dumps({"action": action, "version": version}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    threading.Thread(target=follow, daemon=True).start()
    server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket = listening
    server.serve_forever()


def end(workers: list[int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(1)  # the workers are what shares the cores
    workers = []
    with socket.create_server(("127.0.0.1", settings.port)) as listening:
        for _ in range(settings.workers):
            pid = os.fork()
            if not pid:
                work(listening)
            workers.append(pid)
        signal.signal(signal.SIGTERM, lambda *_: end(workers))
        print(json.dumps({"port": listening.getsockname()[1], "workers": workers}), flush=True)
    for pid in workers:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
