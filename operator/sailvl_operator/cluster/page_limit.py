"""Bounded pages of lists: a page that is too large is refused while it is read, and requested again with fewer objects.

An object may have 1.5 MiB, most of it metadata that any client may write, so a page of 500 could take 750 MiB. Used by
`client.py` and `kopf_session.py`.
"""

from __future__ import annotations

import aiohttp

MAX_PAGE_BYTES = 16 << 20
"""Largest page of several objects, in bytes of JSON; 500 typical pods have 5 MiB."""
_DIVISOR = 8
"""After a page that is too large, this many times fewer objects are requested."""


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
