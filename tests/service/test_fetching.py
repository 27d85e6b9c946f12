"""Images by address: from hosts that the operator lists, within bounds, and from nowhere else."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from elastiformer.errors import InputError
from service import fetching
from service.fetching import MOST_IMAGES, Fetcher
from service.hosts import Hosts
from service.schemas import ClassifyRequest
from tests.elastiformer.test_vlm import elastic
from tests.service.conftest import PATIENCE_SECONDS, House, soon
from tests.service.encoders import content, of_images, of_text, picture, uri, visit
from tests.service.test_logs import written
from tests.service.test_tracing import Memory

BYTES = 20_000
LATE_SECONDS = 0.4
IMAGE = content(picture(1))


class Host(ThreadingHTTPServer):
    """A web server on this machine that remembers what it was asked for, and by which name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str]] = []
        self.leads: dict[str, str] = {}
        self.let_go = threading.Event()
        self.port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that hangs up is part of what is tested."""


class Answers(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        host = self.server
        host.asked.append((self.headers["host"], self.path))
        if self.path in host.leads:
            self.send_response(302)
            self.send_header("location", host.leads[self.path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow":
                self.wfile.write(IMAGE[:9])
                self.wfile.flush()
                host.let_go.wait(PATIENCE_SECONDS)
            elif self.path == "/endless":
                while not host.let_go.is_set():
                    self.wfile.write(b"x" * 10_000)
            else:
                if self.path == "/late":
                    time.sleep(LATE_SECONDS)
                self.wfile.write(b"<html>" if self.path == "/page" else IMAGE)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextmanager
def hosting(tls: ssl.SSLContext | None = None) -> Iterator[Host]:
    with Host() as host:
        if tls is not None:
            host.socket = tls.wrap_socket(host.socket, server_side=True)
        thread = threading.Thread(target=host.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield host
        finally:
            host.let_go.set()
            host.shutdown()
            thread.join()


@pytest.fixture
def host() -> Iterator[Host]:
    with hosting() as host:
        yield host


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """What a name server would say; whatever else is looked up is not found."""
    known: dict[str, list[str]] = {}

    def look_up(name: str, port: int, **_: object) -> list[tuple]:
        try:
            found = [str(ipaddress.ip_address(name))]
        except ValueError:
            if name not in known:
                raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
            found = known[name]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def fetched(address: str, hosts: str, most_seconds: float = PATIENCE_SECONDS) -> str:
    """What stands in a request instead of an address."""
    asked = ClassifyRequest(model="tiny", input={"image": address})

    async def fetch() -> str:
        fetcher = Fetcher(Hosts.parse(hosts), BYTES, most_seconds)
        return (await fetcher.within(asked)).input.image

    return asyncio.run(fetch())


def refused(address: str, hosts: str, most_seconds: float = PATIENCE_SECONDS) -> str:
    with pytest.raises(InputError) as caught:
        fetched(address, hosts, most_seconds)
    message = str(caught.value)
    assert message.startswith("input: ")
    return message


# Over HTTP, as callers see it.


def test_every_route_takes_the_address_of_a_listed_host(host):
    """A picture by its address gives what the same picture in the request gives."""
    at, whole = f"http://127.0.0.1:{host.port}/a.png", uri(IMAGE)

    async def classify(house: House) -> None:
        for path, body in (
            ("/v1/classify", lambda url: {"input": [{"image": url}, {"image": whole}]}),
            ("/v1/classify", lambda url: {"input": {"image": url}}),
            ("/predict", lambda url: {"inputs": {"image": url}}),
        ):
            one = (await house.post(path, **body(at))).json()
            other = (await house.post(path, **body(whole))).json()
            assert other == one if path == "/predict" else other["data"] == one["data"]

    async def embed(house: House) -> None:
        one = (await house.post("/v1/embeddings", input={"image": at})).json()
        other = (await house.post("/v1/embeddings", input={"image": whole})).json()
        assert one["data"] == other["data"]

    async def chat(house: House) -> None:
        said = []
        for url in (at, whole):
            parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
            parts.append({"type": "text", "text": "What is it?"})
            messages = [{"role": "system", "content": "Look"}, {"role": "user", "content": parts}]
            answer = await house.post(
                "/v1/chat/completions", messages=messages, temperature=0, max_tokens=8
            )
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["choices"][0]["message"]["content"])
        assert said[0] == said[1]

    listed = {"image_hosts": "127.0.0.1", "prefix_cache": False}
    visit(of_images(), classify, **listed)
    visit(of_images(task="features"), embed, **listed)
    visit(elastic(), chat, **listed)
    assert host.asked == [(f"127.0.0.1:{host.port}", "/a.png")] * 5


def test_a_request_that_cannot_have_its_image_is_refused_by_name_and_harms_nobody(host):
    at = f"http://127.0.0.1:{host.port}"
    cases = {
        "http://example.com/cat.png": "host 'example.com' is none of those",
        "file:///etc/passwd": "or an http: or https: address; got 'file:///etc/passwd'",
        f"{at}/page": "not an image in a format",
        f"{at}/missing": "answered with status 404, not 200",
    }

    async def talk(house: House) -> None:
        fine = {"image": uri(IMAGE)}
        expected = (await house.post("/v1/classify", input=fine)).json()["data"]
        for given, told in cases.items():
            answer = await house.post("/v1/classify", input=[fine, {"image": given}])
            error = answer.json()["error"]
            assert answer.status_code == 400, answer.text
            assert error["message"].startswith("input.1: ") and told in error["message"]
            assert error["code"] == "invalid_input" and error["param"] == "input"
        assert (await house.post("/v1/classify", input=fine)).json()["data"] == expected
        unknown = await house.post("/v1/classify", model="other", input={"image": f"{at}/a.png"})
        assert unknown.status_code == 404

    visit(of_images(), talk, image_hosts="127.0.0.1")
    assert [path for _, path in host.asked] == ["/page", "/missing"]


def test_for_a_model_that_reads_no_images_nothing_is_fetched(host):
    async def talk(house: House) -> None:
        given = {"image": f"http://127.0.0.1:{host.port}/a.png"}
        answer = await house.post("/v1/classify", input=given)
        assert "this model reads text only" in answer.json()["error"]["message"]

    visit(of_text(), talk, image_hosts="127.0.0.1")
    assert not host.asked


def test_others_are_answered_while_a_host_is_slow(host):
    async def talk(house: House) -> None:
        quick = {"image": uri(IMAGE)}
        await house.post("/v1/classify", input=quick)  # a first step takes longer
        given = {"image": f"http://127.0.0.1:{host.port}/slow"}
        slow = [asyncio.create_task(house.post("/v1/classify", input=given)) for _ in range(24)]
        await soon(lambda: len(host.asked) == len(slow))
        answer = await house.post("/v1/classify", input=quick)
        assert answer.status_code == 200
        assert not any(each.done() for each in slow)
        host.let_go.set()
        answers = await asyncio.gather(*slow)
        assert {each.status_code for each in answers} == {400}

    visit(of_images(), talk, image_hosts="127.0.0.1")


def test_how_long_a_host_takes_is_in_a_request_s_times_and_not_in_its_queue(host):
    """In the answer, the histograms, the log line and the trace; only where something came so."""
    memory = Memory()
    at, whole = f"http://127.0.0.1:{host.port}/late", uri(IMAGE)

    async def talk(house: House) -> None:
        lines = []
        for url in (at, whole):
            parts = [{"type": "image_url", "image_url": {"url": url}}]
            parts.append({"type": "text", "text": "What is it?"})
            with written() as told:
                answer = await house.post(
                    "/v1/chat/completions",
                    messages=[{"role": "user", "content": parts}],
                    max_tokens=4,
                )
            assert answer.status_code == 200, answer.text
            lines += [(json.loads(line), answer.json()["elasti"]) for line in told]
        await house.until_idle()
        (late, elasti), (prompt, soon) = lines
        least = 1000 * LATE_SECONDS
        assert late["fetch_ms"] >= least
        assert elasti["time_to_first_token_ms"] >= late["fetch_ms"] + elasti["queue_ms"]
        assert elasti["total_ms"] >= elasti["time_to_first_token_ms"]
        assert late["engine_ms"] == elasti["total_ms"] <= late["duration_ms"]
        assert "fetch_ms" not in prompt

        for name, spent in (
            ("elasti_e2e_request_latency_seconds_sum", "total_ms"),
            ("elasti_time_to_first_token_seconds_sum", "time_to_first_token_ms"),
            ("elasti_request_queue_time_seconds_sum", "queue_ms"),
        ):
            both = elasti[spent] + soon[spent]
            assert 1000 * house.value(name, tier="1.0") == pytest.approx(both, abs=0.01), name

        fetch = memory.named("fetch")  # of one of the two
        (inference,) = (each for each in memory.spans if each.context == fetch.parent)
        (queue,) = (
            each for each in memory.spans if each.name == "queue" and each.parent == fetch.parent
        )
        assert inference.start_time == fetch.start_time
        assert fetch.end_time == queue.start_time
        assert (fetch.end_time - fetch.start_time) / 1e6 == pytest.approx(
            late["fetch_ms"], abs=0.01
        )
        taken = (inference.end_time - inference.start_time) / 1e6
        assert taken == pytest.approx(elasti["total_ms"], abs=0.01)

    visit(elastic(), talk, image_hosts="127.0.0.1", tracing=memory.tracing)


# Which hosts.


INSIDE = [
    *("127.0.0.1", "10.1.2.3", "192.168.0.9", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
    *("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    *("224.0.0.1", "ff02::1"),
]
ALIKE = [
    *("127.0.0.1.example", "2130706433", "0x7f.1", "[::1]"),
    *("images.example.evil", "sub.images.example", "images.example."),
]


@pytest.mark.parametrize("address", INSIDE)
def test_a_listed_name_does_not_lead_inside(address, host, names):
    """Unless what it leads to is listed, too."""
    names["images.example"] = [address]
    told = refused(f"http://images.example:{host.port}/a.png", "images.example")
    assert "host 'images.example' is at a private address" in told
    assert not host.asked
    assert not Hosts.parse("images.example,localhost").admits("images.example", address)
    assert Hosts.parse(f"a.b,{address.removeprefix('::ffff:')}").admits("images.example", address)


def test_a_listed_name_is_asked_at_a_listed_address(host, names):
    names["images.example"] = ["10.0.0.7", "127.0.0.1"]
    at = f"http://images.example:{host.port}/a.png"
    for hosts in ("images.example,127.0.0.0/8", "IMAGES.example, 127.0.0.1"):
        assert fetched(at, hosts).startswith("data:;base64,")
    assert host.asked == [(f"images.example:{host.port}", "/a.png")] * 2
    names["localhost"] = ["127.0.0.1"]
    assert fetched(f"http://localhost:{host.port}/a.png", "localhost")
    assert "is none of those" in refused(f"http://localhost:{host.port}/a.png", "127.0.0.1")


def test_the_address_that_was_looked_at_is_the_one_that_is_connected_to(host, names, monkeypatch):
    """A name that says another address a moment later gains nothing."""
    names["images.example"] = ["127.0.0.1"]
    look_up, calls = socket.getaddrinfo, []

    def once(name: str, port: int, **more: object) -> list[tuple]:
        calls.append(name)
        found = look_up(name, port, **more)
        names["images.example"] = ["127.0.0.99"]
        return found

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert fetched(f"http://images.example:{host.port}/a.png", "images.example,127.0.0.1")
    assert calls == ["images.example"]


@pytest.mark.parametrize("given", ALIKE)
def test_what_only_looks_like_a_listed_host_is_refused(given, names):
    assert "is none of those" in refused(f"http://{given}/a", "127.0.0.1,images.example")


@pytest.mark.parametrize(
    "given",
    ["http://me@127.0.0.1/a", "http:///a", "http:127.0.0.1", "http://[/a", "http://a\x00b/"],
)
def test_what_is_no_plain_address_is_refused(given):
    assert refused(given, "127.0.0.1")


@pytest.mark.parametrize(
    "hosts", ["https://a.example", "a.example:80", "*", "*.example", "10.0.0.1/8", "a b", "1.2.3"]
)
def test_an_entry_that_is_no_host_is_refused_by_name(hosts):
    with pytest.raises(ValueError, match=r"a host is a name.*got '"):
        Hosts.parse(f"fine.example,{hosts}")


# Within bounds.


def test_redirects_are_followed_to_listed_hosts_alone_and_not_for_ever(host, names):
    names |= {"images.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    host.leads = {
        "/moved": "/a.png",
        "/out": f"http://other.example:{host.port}/a.png",
        "/inside": "http://10.0.0.1/latest/meta-data",
        "/file": "file:///etc/passwd",
        "/round": "/round",
    }
    at, hosts = f"http://images.example:{host.port}", "images.example,127.0.0.1"
    assert fetched(f"{at}/moved", hosts) == fetched(f"{at}/a.png", hosts)
    assert fetched(f"{at}/out", f"{hosts},other.example")
    assert "host 'other.example' is none of those" in refused(f"{at}/out", hosts)
    assert "host '10.0.0.1' is none of those" in refused(f"{at}/inside", hosts)
    assert "leads to, something else than an http:" in refused(f"{at}/file", hosts)
    host.asked.clear()
    assert "leads on more than 3 times" in refused(f"{at}/round", hosts)
    assert len(host.asked) == 4


@pytest.mark.alone
def test_bytes_and_time_are_bounded(host):
    at = f"http://127.0.0.1:{host.port}"
    told = refused(f"{at}/endless", "127.0.0.1")
    assert "at most 20000 bytes together" in told and f"'{at}/endless'" in told
    begun = time.monotonic()
    told = refused(f"{at}/slow", "127.0.0.1", most_seconds=0.3)
    assert "may take 0.3 seconds; " in told and f"'{at}/slow'" in told
    assert time.monotonic() - begun < 5


def test_the_images_of_a_request_count_together_and_each_address_once(host):
    at = f"http://127.0.0.1:{host.port}"

    def within(count: int, most_bytes: int) -> list[str]:
        asked = ClassifyRequest(
            model="tiny", input=[{"image": f"{at}/{n // 2}.png"} for n in range(2 * count)]
        )
        fetcher = Fetcher(Hosts.parse("127.0.0.1"), most_bytes)

        async def fetch() -> list[str]:
            return [each.image for each in (await fetcher.within(asked)).input]

        return asyncio.run(fetch())

    room = MOST_IMAGES * len(IMAGE)
    assert set(within(MOST_IMAGES, room)) == {f"data:;base64,{uri(IMAGE).partition(',')[2]}"}
    assert len(host.asked) == MOST_IMAGES
    with pytest.raises(InputError, match=r"input\.30: the images that are fetched for a request"):
        within(MOST_IMAGES, room - 1)
    with pytest.raises(InputError, match=r"input\.32: one more than the 16 images"):
        within(MOST_IMAGES + 1, 2 * room)


def test_a_host_that_is_silent_or_not_there_is_told(names, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "cannot be fetched" in refused(f"http://127.0.0.1:{port}/a.png", "127.0.0.1")
    assert "no such name" in refused("http://images.example/a.png", "images.example")
    with socket.socket() as full:  # takes no more connections, and so never answers
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        place = full.getsockname()
        callers = [socket.socket() for _ in range(3)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(place)
        monkeypatch.setattr(fetching, "_CONNECT_SECONDS", 0.2)
        told = refused(f"http://127.0.0.1:{place[1]}/", "127.0.0.1")
        assert "no connection within 0.2 seconds" in told
        for caller in callers:
            caller.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_is_checked_for_the_name_and_not_for_the_address(
    tmp_path, names, monkeypatch
):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=images.example "
    command += f"-addext subjectAltName=DNS:images.example -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    names |= {"images.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    hosts = "images.example,other.example,127.0.0.1"
    with hosting(tls) as host:
        at = f"https://images.example:{host.port}/a.png"
        assert "CERTIFICATE_VERIFY_FAILED" in refused(at, hosts)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(at, hosts).startswith("data:;base64,")
        assert "Hostname mismatch" in refused(at.replace("images", "other"), hosts)


def test_no_proxy_of_the_environment_is_asked(host, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetched(f"http://127.0.0.1:{host.port}/a.png", "127.0.0.1")
