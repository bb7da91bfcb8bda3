"""Raising an exception at any one line of the package, to see what it leaves behind."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import hf_partial_embed

_PACKAGE = Path(hf_partial_embed.__file__).parent


def _module(file: str) -> str | None:
    """The name of a module below the package, `None` for files of others."""
    path = Path(file)
    return ".".join(path.relative_to(_PACKAGE).with_suffix("").parts) if path.is_relative_to(_PACKAGE) else None


class Interrupt(BaseException):
    """Comes like Ctrl-C: from anywhere, and no `except Exception` on its way may keep it."""


class Site(NamedTuple):
    """A place of the package: before a line is run, or when a function has done its work and returns."""

    module: str
    line: int
    event: str  # "line" or "return"


class Moment(NamedTuple):
    """The `nth` time that a run comes to a site, from 1 on."""

    site: Site
    nth: int


def moments_of(call: Callable[[], Any], modules: Iterable[str] = ()) -> list[Moment]:
    """All moments of a run, in their order: in the whole package, or in some modules (`"files.hub"`) or wings."""
    found: list[Moment] = []
    _run(call, found, None, tuple(modules))
    return found


def first_moments(moments: Iterable[Moment]) -> list[Moment]:
    """The first moment at each site."""
    return [moment for moment in moments if moment.nth == 1]


def interrupted(call: Callable[[], Any], at: Moment) -> bool:
    """Run a function, with an `Interrupt` at one moment; whether that moment came."""
    try:
        _run(call, [], at, ())
    except Interrupt:
        return True
    return False


def _run(call: Callable[[], Any], found: list[Moment], at: Moment | None, modules: tuple[str, ...]) -> None:
    hits: Counter[Site] = Counter()

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event in ("line", "return"):
            site = Site(_module(frame.f_code.co_filename) or "", frame.f_lineno, event)
            hits[site] += 1
            moment = Moment(site, hits[site])
            if moment == at:
                sys.settrace(None)
                raise Interrupt(moment)
            if at is None:
                found.append(moment)
        return local

    watched: dict[str, bool] = {}

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if name not in watched:
            module = _module(name)
            wing = (module or "").partition(".")[0]
            watched[name] = module is not None and (
                module == at.site.module if at is not None else not modules or module in modules or wing in modules
            )
        return local if watched[name] else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
