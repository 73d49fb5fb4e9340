"""The work of a load without a server: ``python -m tools.benchlib.bare LIBRARY FOLDER TOKENS``.

Drives the simulated libraries directly: for each prompt (a JSON array on
standard input) one encode of ready pixels and one run. Its standard output
gets one JSON object; the NPU's trace says how busy it was.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rknnlite.api import RKNNLite

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.rkllm_library import open_library
from rkvlmd.engine.rkllm_session import ImageTags, Session, Setup, infer_param


def main(library: str, folder: str, tokens: int) -> None:
    """Load, wait for the prompts, do them one after the other."""
    path = Path(folder)
    manifest = json.loads((path / "rkvlm.json").read_text())
    encoder, decoder = manifest["encoders"][0], manifest["decoder"]
    session = Session(open_library(library))
    image = manifest["image"]
    tags = ImageTags(*(image[key].encode() for key in ("start", "end", "content")))
    model = path / decoder["files"]["model"]["file"]
    session.open(Setup(model, decoder["context"], decoder["context"], tags=tags, domain=1))
    session.raw_template()
    lite = RKNNLite()
    if lite.load_rknn(str(path / encoder["file"])) != 0 or lite.init_runtime(core_mask=7) != 0:
        raise SystemExit("the encoder cannot be loaded")
    lite.rknn_data = None
    side = encoder["width"]
    shape = {"width": side, "height": side, "tags": tags, "tokens": encoder["tokens"]}
    row = decoder["embedding"] * encoder["outputs"]
    # Ready pixels, as the libraries take them; each picture is another one.
    prompts = json.loads(sys.stdin.readline())
    ready = [
        np.full((1, side, side, 3), number % 251 + 1, np.uint8) for number in prompts_of(prompts)
    ]
    layout = session.library.layout
    infer = infer_param(session.library, max_new_tokens=tokens)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic_ns()
    for prompt, pixels in zip(prompts, ready, strict=True):
        found = lite.inference(inputs=[pixels], data_format=["nhwc"])
        rows = np.stack(found, axis=1).reshape(encoder["tokens"], -1)
        block = inputs.stack([rows], row=row, **shape)
        value = inputs.multimodal_input(layout, prompt.encode(), block)
        if session.run(value, infer, _take) != 0:
            raise SystemExit("a run failed")
    print(json.dumps({"began": began, "ended": time.monotonic_ns()}), flush=True)
    session.close()
    lite.release()


def prompts_of(prompts: list[str]) -> range:
    """Return a number for each prompt."""
    return range(len(prompts))


def _take(_state: Any, result: Any) -> int:
    """What a program needs of each token: its text."""
    if result is not None and result.text:
        len(result.text)
    return 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
