"""The prep child: what clients sent becomes pixels and token ids."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence

from rkvlmd.engine import heap, memfd
from rkvlmd.engine.loop import Order, Send
from rkvlmd.engine.script import Script
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest, views
from rkvlmd.wire import child

#: How far behind the other processes of the daemon a prep child stands (nice(2)).
NICE = 5
#: Modules of this package that orders need. Jinja, tokenizers and what comes with them take 4 MB.
WARM = ("pictures", "render")


class PrepRole:
    """Decodes pictures and renders prompts, one at a time."""

    def __init__(self, script: Script | None = None, warm: Sequence[str] = WARM) -> None:
        self._script = script
        self._warm = warm

    def warm(self) -> None:
        """Import what the orders to come need, while the daemon is still busy with the body."""
        # The daemon's loop and the engine come first: a picture can wait, a token cannot.
        os.nice(NICE)
        for name in self._warm:
            importlib.import_module(f"rkvlmd.engine.{name}")
        heap.give_back()

    def abort(self) -> None:
        """Nothing: an order ends by itself or with the process."""

    def work(self, order: Order, fds: Sequence[int], send: Send) -> None:
        """Do one order.

        Raises:
          RkvlmdError: the picture or the conversation is at fault, or the model's files.
          memfd.MemoryFileError: the daemon sent something else than it said.

        """
        try:
            self._work(order, fds, send)
        finally:
            heap.trim()  # the answer is on its way already

    def _work(self, order: Order, fds: Sequence[int], send: Send) -> None:
        if isinstance(order, child.Picture):
            if self._script is not None:
                self._script.strike("picture")
            self._picture(order, fds, send)
        elif isinstance(order, child.Video):
            from rkvlmd.engine import video_order

            if self._script is not None:
                self._script.strike("video")
            video_order.work(order, fds, send)
        elif isinstance(order, child.Frames):
            from rkvlmd.engine import frames_order

            if self._script is not None:
                self._script.strike("picture")
            frames_order.work(order, fds, send)
        elif isinstance(order, child.Render):
            if self._script is not None:
                self._script.strike("render")
            self._render(order, send)
        else:
            raise ValueError(f"{type(order).__name__} is no order for a prep child")

    def _picture(self, order: child.Picture, fds: Sequence[int], send: Send) -> None:
        from rkvlmd.engine import pictures

        if len(fds) != 1:
            raise memfd.MemoryFileError(f"picture with {len(fds)} descriptors")
        model = manifest.from_builtins(order.manifest)
        limits = pictures.Limits(
            max_bytes=order.max_bytes,
            max_pixels=order.max_pixels,
            min_side=order.min_side,
            max_aspect=order.max_aspect,
        )
        try:
            size = memfd.checked_size(fds[0])
            if order.encoding == "base64":
                pictures.check_text(size, limits)
                data = pictures.from_base64(memfd.read(fds[0]), limits)
            else:
                pictures.check_bytes(size, limits)
                data = memfd.read(fds[0])
        except MemoryError:
            raise RkvlmdError(
                "image_file_too_large", "The picture file needs more memory than one may take."
            ) from None
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in order.known:
            # Whoever asks has its rows, and knows what it becomes.
            known = child.PictureDone(
                id=order.id, sha256=sha256, width=0, height=0, format="", views=[], layout=[]
            )
            send(known, ())
            return
        prepared = pictures.stream_views(
            data,
            lambda width, height: views.plan(model, width, height, order.detail),
            model.encoders,
            limits,
            exact=order.exact,
        )
        fds = []
        try:
            built = []
            for view, array in zip(prepared.plan.views, prepared.tensors, strict=True):
                fd, shown = memfd.from_view(view, array)
                fds.append(fd)
                built.append(shown)
            send(
                child.PictureDone(
                    id=order.id,
                    sha256=sha256,
                    width=prepared.width,
                    height=prepared.height,
                    format=prepared.format,
                    views=built,
                    layout=list(prepared.plan.layout),
                    tiles=prepared.plan.tiles,
                ),
                fds,
            )
        finally:
            for fd in fds:
                os.close(fd)

    def _render(self, order: child.Render, send: Send) -> None:
        from rkvlmd.engine import render

        model = manifest.from_builtins(order.manifest)
        make = render.render_text if model.decoder.engine == "rkllm" else render.render
        try:
            made = make(order.folder, model, order.turns, order.pictures, order.thinking)
        except MemoryError:
            raise RkvlmdError(
                "server_error", "The conversation needs more memory than one may take."
            ) from None
        # Of a prompt that does not fit its count is enough: millions of tokens fit into no frame.
        over = len(made.tokens) > model.decoder.context
        send(
            child.RenderDone(
                id=order.id,
                tokens=[] if over else made.tokens,
                spans=[] if over else made.spans,
                prompt="" if over else made.text,
                count=len(made.tokens) if over else made.most,
                thinks=made.thinks,
                switched=made.switched,
            )
        )
