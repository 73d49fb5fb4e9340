"""The simulator's mind: ``python -m tests.npusim.mind SOCKET FOLDER``.

Runs the language decoder of a model folder of the ONNX engine, and answers
what the simulated ``librkllmrt.so`` received: the prompt's texts and the rows
of its pictures, as they arrived. Prints ``ready``; serves one at a time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.engine.render import _words
from rkvlmd.models import manifest as manifests
from rkvlmd.models import prompt
from rkvlmd.wire import child


class Mind:
    """A decoder and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        tree = json.loads((folder / "rkvlm.json").read_text())
        self.manifest = manifests.from_builtins(tree)
        self.words = _words(str(folder), self.manifest)
        self.decoder = OnnxDecoder()
        self.decoder.load(child.Load(folder=str(folder), manifest=tree), lambda *_: None)

    def answer(self, asked: dict[str, Any], floats: bytes) -> list[str]:
        """Return the pieces of the answer, greedy, as the library expands and tokenises."""
        between = asked["start"] + asked["content"] + asked["end"]
        ids = self.words.encode(between.join(asked["texts"]))
        count = asked["pictures"]
        places = [(picture, 0, asked["tokens"]) for picture in range(count)]
        tokens, spans = prompt.expand(ids, self.words.content, places)
        shape = (count, asked["tokens"], asked["columns"])
        rows = np.frombuffer(floats, np.float32).reshape(shape)
        order = child.Generate(
            id=1,
            tokens=tokens,
            spans=[
                child.Span(start=start, count=size, key=str(zlib.crc32(rows[i].tobytes())))
                for start, size, i, _ in spans
            ],
            max_tokens=asked["most"],
        )
        said: list[Any] = []
        self.decoder.generate(order, list(rows), said.append)
        return [m.text for m in said if isinstance(m, child.Text) and m.text]


def main(path: str, folder: str) -> None:
    mind = Mind(Path(folder))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            peer, _ = server.accept()
            with peer, peer.makefile("rb") as file:
                if not (line := file.readline()):
                    continue  # somebody who looks whether this is ready
                asked = json.loads(line)
                size = asked["pictures"] * asked["tokens"] * asked["columns"] * 4
                pieces = mind.answer(asked, file.read(size))
                lines = "".join(f"{piece.encode().hex()}\n" for piece in pieces)
                peer.sendall(f"{lines}end".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
