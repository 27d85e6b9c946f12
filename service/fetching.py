"""Images that a request names by address: fetched before the desk sees it, so that what goes
further holds data URIs alone.

Fetched is only from the hosts that the operator lists (hosts.py), and the address that was looked
at is the one that is connected to, at each redirect anew: what a name points to a moment later
changes nothing. Bytes, time, redirects and images are bounded. Nothing here waits for a host on
the event loop, or knows what an image looks like.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from elastiformer.errors import InputError
from service.hosts import Hosts
from service.orders import fetched_for
from service.schemas import (
    ChatRequest,
    ClassifyRequest,
    EmbeddingRequest,
    Image,
    Message,
    Part,
    PredictRequest,
)

MOST_IMAGES, MOST_REDIRECTS, MOST_SECONDS = 16, 3, 10.0  # of one request
_CONNECT_SECONDS = 4.0  # to one address; the next one is tried then
_AT_ONCE = 32  # requests that fetch, over the whole server
_LOOK_UPS = 4  # names that are looked up together: each takes a thread
_SHOWN = 80  # characters of a refused address
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "elastiformer"}

R = TypeVar("R", ChatRequest, ClassifyRequest, PredictRequest, EmbeddingRequest)
T = TypeVar("T")


class Fetcher:
    """Fetches for all requests of one server; each request is an errand of its own."""

    def __init__(self, hosts: Hosts, most_bytes: int, most_seconds: float = MOST_SECONDS) -> None:
        """
        Args:
            most_bytes: of all images of one request together.
            most_seconds: for all of them together, waiting included.
        """
        self.hosts, self.most_bytes, self.most_seconds = hosts, most_bytes, most_seconds
        self._tls = httpx.create_ssl_context()
        self.room = asyncio.Semaphore(_AT_ONCE)
        # Threads of their own: a name server that is silent must not hold up the desk.
        self._look_ups = ThreadPoolExecutor(_LOOK_UPS, "names")

    async def within(self, asked: R) -> R:
        """The request with each address of an image replaced by the image.

        How long that took goes with the context, to whoever tells the request's times.

        Raises:
            InputError: a host that is not listed, too large, too late, or not to be had.
        """
        errand, began = _Errand(self), time.monotonic()
        try:
            async with asyncio.timeout(self.most_seconds):
                whole = await errand.run(asked)
        except TimeoutError:
            raise InputError(
                f"{errand.name}: the images of a request may take {self.most_seconds:g} seconds; "
                f"{errand.shown} took longer"
            ) from None
        fetched_for.set(time.monotonic() - began if errand.found else 0.0)
        return whole

    async def look_up(self, host: str, port: int) -> list[str]:
        """The addresses of a host, in the order in which they should be tried."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._look_ups,
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        )
        return list(dict.fromkeys(str(place[0]) for *_, place in found))

    def client(self) -> httpx.AsyncClient:
        """One for each errand: it keeps cookies. No connection is used twice, as a second name at
        the same address would then pass under the first one's certificate."""
        return httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,  # a proxy would look names up itself
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        )


@dataclass(slots=True)
class _Errand:
    """What one request has fetched so far, and what it is at: `name` of the field, and address."""

    fetcher: Fetcher
    name: str = "input"
    address: str = ""
    taken_bytes: int = 0
    found: dict[str, str] = field(default_factory=dict)  # data URIs, by address

    @property
    def shown(self) -> str:
        return repr(self.address[:_SHOWN])

    async def run(self, asked: R) -> R:
        if isinstance(asked, ChatRequest):
            messages = [
                await self._message(message, f"messages.{place}")
                for place, message in enumerate(asked.messages)
            ]
            return asked.model_copy(update={"messages": messages})
        of = "inputs" if isinstance(asked, PredictRequest) else "input"
        return asked.model_copy(update={of: await self._items(getattr(asked, of), of)})

    async def _message(self, message: Message, name: str) -> Message:
        if not isinstance(message.content, list):
            return message
        parts = [
            await self._part(part, f"{name}.content.{number}")
            for number, part in enumerate(message.content)
        ]
        return message.model_copy(update={"content": parts})

    async def _part(self, part: Part, name: str) -> Part:
        if part.type != "image_url" or part.image_url is None:
            return part
        url = await self._image(part.image_url.url, name)
        return part.model_copy(update={"image_url": part.image_url.model_copy(update={"url": url})})

    async def _items(self, given: object, name: str) -> object:
        if not isinstance(given, list):
            return await self._item(given, name)
        if len(given) == 1:
            return [await self._item(given[0], name)]
        return [await self._item(each, f"{name}.{place}") for place, each in enumerate(given)]

    async def _item(self, given: T, name: str) -> T:
        if not isinstance(given, Image):
            return given
        return given.model_copy(update={"image": await self._image(given.image, name)})

    async def _image(self, uri: str, name: str) -> str:
        """A data URI as it is; the image at an address as one."""
        if uri[:5].lower() == "data:":
            return uri
        self.name, self.address = name, uri
        if uri in self.found:
            return self.found[uri]
        if re.match("https?:", uri, re.IGNORECASE) is None:
            raise InputError(
                f"{name}: an image is a data URI, data:image/png;base64,…, or an http: or https: "
                f"address; got {self.shown}"
            )
        if len(self.found) == MOST_IMAGES:
            raise InputError(
                f"{name}: one more than the {MOST_IMAGES} images that are fetched for a request"
            )
        async with self.fetcher.room, self.fetcher.client() as client:
            content = await self._follow(client)
        self.taken_bytes += len(content)
        self.found[uri] = f"data:;base64,{base64.b64encode(content).decode()}"
        return self.found[uri]

    async def _follow(self, client: httpx.AsyncClient) -> bytes:
        """What is at the address, or where it leads to."""
        try:
            at = httpx.URL(self.address)
            for _ in range(MOST_REDIRECTS + 1):
                response = await self._ask(client, at)
                try:
                    if not response.has_redirect_location:
                        return await self._read(response)
                    at = at.join(response.headers["location"])
                finally:
                    await response.aclose()
        except httpx.ConnectTimeout:
            raise InputError(
                f"{self.name}: {self.shown} cannot be fetched: no connection within "
                f"{_CONNECT_SECONDS:g} seconds"
            ) from None
        # A ValueError: what a host sent or a caller wrote, and no library could make sense of.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise InputError(
                f"{self.name}: {self.shown} cannot be fetched: {str(error) or type(error).__name__}"
            ) from None
        raise InputError(f"{self.name}: {self.shown} leads on more than {MOST_REDIRECTS} times")

    async def _ask(self, client: httpx.AsyncClient, at: httpx.URL) -> httpx.Response:
        """The beginning of an answer from one of the host's addresses."""
        host = at.raw_host.decode("ascii")
        failure: Exception | None = None
        for address in await self._addresses(at, host):
            request = client.build_request(
                "GET",
                at.copy_with(host=address),
                headers={**_HEADERS, "host": at.netloc.decode("ascii")},
                extensions={"sni_hostname": host},
            )
            try:
                return await client.send(request, stream=True, follow_redirects=False)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        assert failure is not None, "a host has an address"
        raise failure

    async def _addresses(self, at: httpx.URL, host: str) -> Sequence[str]:
        """Those of a host that may be connected to; at least one."""
        if at.scheme not in ("http", "https") or at.userinfo or not host:
            raise InputError(
                f"{self.name}: {self.shown} is, or leads to, something else than an http: or "
                "https: address of a host, without a user"
            )
        hosts = self.fetcher.hosts
        if not hosts.lists(host):
            raise InputError(
                f"{self.name}: {self.shown}: host {host!r} is none of those that this server "
                "fetches images from"
            )
        port = at.port or {"http": 80, "https": 443}[at.scheme]
        found = await self.fetcher.look_up(host, port)
        admitted = [address for address in found if hosts.admits(host, address)]
        if not admitted:
            raise InputError(
                f"{self.name}: {self.shown}: host {host!r} is at a private address, which this "
                "server fetches nothing from"
            )
        return admitted

    async def _read(self, response: httpx.Response) -> bytes:
        """The body of an answer, as it was sent."""
        if response.status_code != httpx.codes.OK:
            raise InputError(
                f"{self.name}: {self.shown} answered with status {response.status_code}, not 200"
            )
        most = self.fetcher.most_bytes
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if self.taken_bytes + len(content) > most:
                raise InputError(
                    f"{self.name}: the images that are fetched for a request have at most {most} "
                    f"bytes together; with {self.shown} they have more"
                )
        return bytes(content)
