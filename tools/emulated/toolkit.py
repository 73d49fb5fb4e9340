"""Runs in a Python environment with rknn-toolkit2: converts an encoder, then is its NPU.

``python toolkit.py ORDER.json``: the order has ``onnx``, ``rknn`` (where to write), ``socket``,
``log``, ``platform``, ``width``, ``height``, ``mean`` and ``std`` on the 0..255 scale.

The simulator runs only what was built in the same process, so this one converts and then serves.
A client sends ``init SIZE`` and a model file, which must be the one that was written, and then
``run SIZE`` and pixels as often as it likes; answers are a code, and what belongs to it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rknn.api import RKNN


def convert(order: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the built model with its simulator, and the names of its inputs and outputs."""
    graph = onnx.load(order["onnx"]).graph
    names = [graph.input[0].name, *(output.name for output in graph.output)]
    made = RKNN(verbose=False)
    made.config(
        target_platform=order["platform"], mean_values=[order["mean"]], std_values=[order["std"]]
    )
    size = [[1, 3, order["height"], order["width"]]]
    for what, code in (
        ("load", made.load_onnx(order["onnx"], inputs=names[:1], input_size_list=size)),
        ("build", made.build(do_quantization=False)),
        ("export", made.export_rknn(order["rknn"])),
        ("simulator", made.init_runtime(target=None)),
    ):
        if code != 0:
            sys.exit(f"rknn-toolkit2: {what} returned {code}")
    return made, names


class Npu:
    """The simulator; one run at a time."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._made, self._names = convert(order)
        self._model = Path(order["rknn"]).read_bytes()
        self._shape = (1, order["height"], order["width"], 3)
        self._log = Path(order["log"])
        self._lock = threading.Lock()
        self._shapes = [list(o.shape) for o in self._infer(np.zeros(self._shape, np.uint8))]

    def _infer(self, pixels: Any) -> list[Any]:
        with self._lock:
            found = self._made.inference(inputs=[pixels], data_format=["nhwc"])
        return [np.ascontiguousarray(output, np.float32) for output in found]

    def serve(self, peer: socket.socket) -> None:
        """Serve one context until it leaves."""
        with peer, peer.makefile("rb") as file:
            while line := file.readline():
                what, size = line.split()
                data = file.read(int(size))
                peer.sendall(self._init(data) if what == b"init" else self._run(data))

    def _init(self, model: bytes) -> bytes:
        if model != self._model:
            return b"-6\n"
        lines = [f"0 1 {len(self._shapes)}"]
        for name, shape in zip(self._names, [self._shape, *self._shapes], strict=True):
            lines.append(" ".join(map(str, (name, *shape))))
        return "\n".join([*lines, ""]).encode()

    def _run(self, data: bytes) -> bytes:
        pixels = np.frombuffer(data, np.uint8)
        if pixels.size != np.prod(self._shape):
            return b"-8\n"
        outputs = self._infer(pixels.reshape(self._shape))
        rows = outputs[0].reshape(-1, outputs[0].shape[-1])
        total = 0
        for row in rows:
            total = zlib.crc32(zlib.crc32(row.tobytes()).to_bytes(4, "little"), total)
        with self._log.open("a") as file:
            file.write(json.dumps({"pixels": zlib.crc32(data), "rows": f"{total:08x}"}) + "\n")
        return b"0\n" + b"".join(output.tobytes() for output in outputs)


def main(path: str) -> None:
    """Convert, then serve for ever."""
    order = json.loads(Path(path).read_text())
    npu = Npu(order)
    with socket.socket(socket.AF_UNIX) as server:
        Path(order["socket"]).unlink(missing_ok=True)
        server.bind(order["socket"])
        os.chmod(order["socket"], 0o666)
        server.listen()
        while True:
            peer, _ = server.accept()
            threading.Thread(target=npu.serve, args=(peer,), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
