"""A daemon for ``rkvlmd demo``: listens, answers what its second argument says, leaves on SIGTERM.

Its first argument is a file that it writes the requests to, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

RECORD, MODE = sys.argv[1:3]


def chunk(text):
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        with open(RECORD, "ab") as record:
            record.write(body + b"\n")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if MODE == "error":
            events = [chunk("half"), {"error": {"message": "the child died", "code": "x"}}]
        elif MODE == "silent":
            events = [{"choices": []}]
        elif MODE == "interrupted":
            os.kill(os.getppid(), signal.SIGINT)
            signal.pause()
            return
        else:
            timings = {"queue": 0, "encode": 0.012, "first_token": 0.02, "total": 0.5}
            last = {"choices": [], "usage": {}, "timings": timings}
            events = [chunk("A red "), chunk("star."), last]
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args):
        pass


if MODE == "broken":
    print("models.dir: cannot be read", file=sys.stderr)
    sys.exit(78)
if MODE == "mute":
    print("hello", flush=True)
server = HTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9 if MODE == "bad-end" else 0))
print(f"rkvlmd 0 listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
