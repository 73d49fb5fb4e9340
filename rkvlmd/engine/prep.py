"""The prep child: what clients sent becomes pixels and token ids."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence

from rkvlmd.engine import memfd
from rkvlmd.engine.loop import Order, Send
from rkvlmd.engine.script import Script
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest, views
from rkvlmd.wire import child

#: How far behind the other processes of the daemon a prep child stands (nice(2)).
NICE = 5


class PrepRole:
    """Decodes pictures and renders prompts, one at a time."""

    def __init__(self, script: Script | None = None) -> None:
        self._script = script

    def warm(self) -> None:
        """Import what both orders need, while the daemon is still busy with the body."""
        # The daemon's loop and the engine come first: a picture can wait, a token cannot.
        os.nice(NICE)
        for name in ("pictures", "render"):
            importlib.import_module(f"rkvlmd.engine.{name}")

    def abort(self) -> None:
        """Nothing: an order ends by itself or with the process."""

    def work(self, order: Order, fds: Sequence[int], send: Send) -> None:
        """Do one order.

        Raises:
          RkvlmdError: the picture or the conversation is at fault, or the model's files.
          memfd.MemoryFileError: the daemon sent something else than it said.

        """
        if isinstance(order, child.Picture):
            if self._script is not None:
                self._script.strike("picture")
            self._picture(order, fds, send)
        elif isinstance(order, child.Video):
            from rkvlmd.engine import video_order

            if self._script is not None:
                self._script.strike("video")
            video_order.work(order, fds, send)
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
        prepared = pictures.prepare_views(
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
                fd, tensor = memfd.from_array(array, "rkvlmd-pixels")
                fds.append(fd)
                built.append(
                    child.View(
                        encoder=view.encoder,
                        tensor=tensor,
                        tokens=view.tokens,
                        patches=view.patches,
                        grid=view.grid,
                    )
                )
            send(
                child.PictureDone(
                    id=order.id,
                    sha256=hashlib.sha256(data).hexdigest(),
                    width=prepared.width,
                    height=prepared.height,
                    format=prepared.format,
                    views=built,
                    layout=list(prepared.plan.layout),
                ),
                fds,
            )
        finally:
            for fd in fds:
                os.close(fd)

    def _render(self, order: child.Render, send: Send) -> None:
        from rkvlmd.engine import render

        model = manifest.from_builtins(order.manifest)
        text, count = "", 0
        try:
            if model.decoder.engine == "rkllm":
                text, tokens, spans, count = render.render_text(
                    order.folder, model, order.turns, order.pictures
                )
            else:
                tokens, spans = render.render(order.folder, model, order.turns, order.pictures)
        except MemoryError:
            raise RkvlmdError(
                "server_error", "The conversation needs more memory than one may take."
            ) from None
        send(child.RenderDone(id=order.id, tokens=tokens, spans=spans, prompt=text, count=count))
