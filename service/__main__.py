"""Serve pretrained transformers with a compute capacity per request.

    python -m service
    python -m service --port 8123 --model mine=./llama,adapter=./adapter

Without --model the embedded models are served. Every flag is a variable too:
ELASTI_PORT=8123. What happens is told on stderr. One signal to stop lets running requests
finish, a second one does not; while models are loading, the first one ends it at once. Under
torchrun the model is spread over all processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from pydantic import ValidationError
from pydantic_settings import SettingsError

from elastiformer.errors import ElastiError
from elastiformer.led import LedModel
from service import led
from service.app import create_app
from service.logs import configure, say
from service.metrics import Metrics
from service.served import load
from service.server import Server
from service.settings import Key, Settings, read_keys
from service.tracing import from_environment


def main(argv: Sequence[str] | None = None) -> int:
    given = {name: value for name, value in vars(parser().parse_args(argv)).items() if value}
    try:
        settings = Settings(**given)
        led.check(settings)
        keys = read_keys(settings.keys_file) if settings.keys_file else ()
        place = listen(settings) if led.is_first() else None
    except (ValidationError, SettingsError, ValueError, OSError) as error:
        say(f"error: {_told(error)}")
        return 2
    tell = configure(settings.log_format, settings.log_level)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with led.group():
        if place is None:
            return led.follow(settings, tell)
        with place:
            return serve(settings, keys, place, tell)


def serve(
    settings: Settings, keys: Sequence[Key], place: socket.socket, tell: Callable[[str], None]
) -> int:
    metrics = Metrics()
    with leaving_at_once(tell):
        try:
            catalogue = load(settings, metrics, tell)
        except ElastiError as error:
            tell(f"error: {error}")
            return 1
        app = create_app(settings, catalogue, metrics, keys, from_environment(tell))
    Server(app, settings, place, tell).run(sockets=[place])
    for served in catalogue:
        if isinstance(served.model, LedModel):
            served.model.end()
    return 0


@contextmanager
def leaving_at_once(tell: Callable[[str], None]) -> Iterator[None]:
    """Until the block is left, a signal to stop ends the process: nobody waits for an answer.

    As process 1 of a container it would hear no signal without this.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        try:
            tell(f"stopping: {signal.Signals(number).name} while models were loading")
        finally:
            os._exit(0)  # an exception might be taken for another one by what is loading

    before = {each: signal.signal(each, leave) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def parser() -> argparse.ArgumentParser:
    """One flag per setting, from the settings themselves."""
    usage = argparse.ArgumentParser(
        prog="python -m service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=None,
    )
    for name, field in Settings.model_fields.items():
        told = f"{field.description} [ELASTI_{name.upper()}]".replace("%", "%%")
        if name == "models":
            usage.add_argument(
                "--model",
                dest=name,
                action="append",
                metavar="NAME=BASE[,adapter=DIR][,task=TASK]",
                help=told,
            )
        else:
            usage.add_argument(flag(name), dest=name, metavar="VALUE", help=told)
    return usage


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--model" if name == "models" else "--" + name.replace("_", "-")


def listen(settings: Settings) -> socket.socket:
    """Take the port before the weights are loaded: a port in use is told at once.

    Raises:
        OSError: naming the address.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol by name: only then asyncio sets TCP_NODELAY, and small answers go out at once.
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((settings.host, settings.port))
    except OSError as error:
        place.close()
        raise OSError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}"
        ) from None
    return place


def _told(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    told = []
    for each in error.errors():
        name = flag(str(each["loc"][0])) if each["loc"] else "settings"
        if each["type"] == "value_error":
            told.append(f"{name}: {each['msg'].removeprefix('Value error, ')}")
        else:
            told.append(f"{name}: {each['msg'].removeprefix('Input ')}; got {each['input']!r}")
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(main())
