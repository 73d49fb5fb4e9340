"""What pictures became that were prepared before, while the cache has the rows of all their views."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from rkvlmd.actors.embeddings import EmbeddingCache
    from rkvlmd.actors.ready import Picture

#: Most views that are remembered, of all pictures together: about a kilobyte each. Only jobs that
#: wait, or a cache of small rows, have so many.
MOST_VIEWS = 1024
#: Most files of one size that a prep child is told of.
MOST_ALIKE = 32


class Source(NamedTuple):
    """What is known of a picture before anybody reads it.

    ``how`` is everything that decides what it becomes, its limits among it;
    ``size`` counts bytes in ``encoding``.
    """

    how: tuple[object, ...]
    encoding: str
    size: int


class Seen:
    """Remembers views, layout and hash of pictures, never their pixels.

    So a picture that comes again, as in each turn of a conversation, is hashed
    and not decoded. Files are looked for by their size, so that an order to a
    prep child holds few hashes. A picture is forgotten when rows of it leave
    the cache, or when its job ends before they came: it would be decoded
    anyway. Beyond ``MOST_VIEWS`` the least recently used are forgotten first.
    """

    def __init__(self, cache: EmbeddingCache) -> None:
        self._cache = cache
        self._pictures: OrderedDict[tuple[Source, str], Picture] = OrderedDict()
        self._alike: dict[Source, OrderedDict[str, None]] = {}
        self._views = 0
        cache.on_leave = self._left

    def __len__(self) -> int:
        return len(self._pictures)

    def hashes(self, source: Source) -> list[str]:
        """Return the SHA-256 of those that it may be and whose rows are all here."""
        return [
            sha256
            for sha256 in self._alike.get(source, ())
            if all(self._cache.has(view.key) for view in self._pictures[source, sha256].views)
        ]

    def claim(self, source: Source, sha256: str) -> Picture | None:
        """Return the picture without pixels; its rows stay in the cache until it is closed.

        ``None``: rows have left meanwhile, or too many are claimed; then it
        must be decoded.
        """
        picture = self._pictures.get((source, sha256))
        if picture is None:
            return None
        keys = tuple(view.key for view in picture.views)
        if not self._cache.claim(keys):
            return None
        self._use(source, sha256)
        return replace(picture, release=lambda: self._cache.release(keys))

    def learn(self, source: Source, picture: Picture) -> Picture:
        """Remember what a picture has become; return it for the job that has it."""
        self._remember(source, picture)
        return replace(picture, release=lambda: self._settle(source, picture))

    def _settle(self, source: Source, picture: Picture) -> None:
        """Its job has ended: from now on it is known as long as its rows are here."""
        if not all(self._cache.has(view.key) for view in picture.views):
            self._forget(source, picture.sha256)
        elif (source, picture.sha256) not in self._pictures:
            self._remember(source, picture)

    def _left(self, keys: Collection[str]) -> None:
        """Forget what can only be decoded again."""
        gone = [
            known
            for known, picture in self._pictures.items()
            if any(view.key in keys for view in picture.views)
        ]
        for source, sha256 in gone:
            self._forget(source, sha256)

    def _remember(self, source: Source, picture: Picture) -> None:
        sha256 = picture.sha256
        self._forget(source, sha256)
        views = tuple(replace(view, pixels=None) for view in picture.views)
        self._pictures[source, sha256] = replace(picture, views=views)
        self._alike.setdefault(source, OrderedDict())[sha256] = None
        self._views += len(views)
        if len(self._alike[source]) > MOST_ALIKE:
            self._forget(source, next(iter(self._alike[source])))
        while self._views > MOST_VIEWS:
            self._forget(*next(iter(self._pictures)))

    def _use(self, source: Source, sha256: str) -> None:
        self._pictures.move_to_end((source, sha256))
        self._alike[source].move_to_end(sha256)

    def _forget(self, source: Source, sha256: str) -> None:
        picture = self._pictures.pop((source, sha256), None)
        if picture is None:
            return
        self._views -= len(picture.views)
        del self._alike[source][sha256]
        if not self._alike[source]:
            del self._alike[source]
