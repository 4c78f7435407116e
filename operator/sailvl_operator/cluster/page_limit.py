"""Bounded pages of lists: a page that is too large is refused while it is read, and requested again with fewer objects.

An object may have 1.5 MiB, most of it metadata that any client may write, so a page of 500 could take 750 MiB. Decoded,
an object may take ten times as much, so one is decoded after the other. Used by `client.py` and `kopf_session.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import aiohttp
import msgspec

from sailvl_operator.api.untrusted import DocumentError, decode_json
from sailvl_operator.cluster.resources import ObjectType
from sailvl_operator.cluster.watch_stream import Object
from sailvl_operator.errors import Unreachable

MAX_PAGE_BYTES = 16 << 20
"""Largest page of several objects, in bytes of JSON; 500 typical pods have 5 MiB."""
_DIVISOR = 8
"""After a page that is too large, this many times fewer objects are requested."""


class PageItems:
    """The objects of a page, each decoded when it is reached."""

    def __init__(self, items: Sequence[msgspec.Raw], decode_as: ObjectType, *, subject: str) -> None:
        self._items = items
        self._decode_as = decode_as
        self._subject = subject

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Object]:
        """Decode one object after another. Raises Unreachable for a malformed one."""
        for item in self._items:
            try:
                decoded: Object = decode_json(memoryview(item), self._decode_as, subject="an object")
            except DocumentError as error:
                raise Unreachable(f"{self._subject}: {error}") from error
            yield decoded


class Page(NamedTuple):
    """One page of a list."""

    items: PageItems
    resource_version: str
    """Version of the whole list, from which a watch can start."""


_ListMeta = TypedDict("_ListMeta", {"resourceVersion": str, "continue": str}, total=False)


class RawPage(TypedDict, total=False):
    """A page as the API server sends it, whose objects are not decoded."""

    metadata: _ListMeta
    items: list[msgspec.Raw] | None


class PageTooLargeError(Exception):
    """A page of several objects exceeds the limit; request fewer objects."""


class PageLimit:
    """Number of objects to request in the next page. It falls after a page that is too large, and doubles after each
    small page, up to `max_objects`."""

    def __init__(self, max_objects: int) -> None:
        self._max_objects = max_objects
        self.objects = max_objects

    @property
    def max_bytes(self) -> int | None:
        """Largest page that is read; None for a page of one object, which the API server bounds."""
        return MAX_PAGE_BYTES if self.objects > 1 else None

    def shrink(self) -> None:
        """Request fewer objects, because a page was too large."""
        self.objects = max(1, self.objects // _DIVISOR)

    def grow(self, read_bytes: int) -> None:
        """Request more objects if a page of `read_bytes` bytes was small."""
        if read_bytes < MAX_PAGE_BYTES // 4:
            self.objects = min(self._max_objects, 2 * self.objects)


async def read_page(response: aiohttp.ClientResponse, max_bytes: int | None) -> bytearray:
    """Read the body of a response. Raises PageTooLargeError as soon as it has more than `max_bytes` bytes; None: of any
    size."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if max_bytes is not None and len(content) > max_bytes:
            raise PageTooLargeError(f"the page has more than {max_bytes} bytes")
    return content
