"""Whether anything of a run is saved, by this start of the command or by one before it.

A start that has saved nothing must not be repeated for ever, and a message must not promise what is not there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _State:
    is_run: bool = False  # whether this process works on something that saves
    before: bool = False
    now: bool = False
    resume: str = "auto"


_state = _State()


def begin_start() -> None:
    """A start of a command that saves what it has done begins; nothing of it is saved yet."""
    _state.is_run, _state.before, _state.now = True, False, False


def note_resume(resume: str) -> None:
    """The option `resume`: with another value than auto the same command does not continue."""
    _state.resume = resume


def note_saved(*, before: bool = False) -> None:
    """Something that need not be computed again is saved; `before`: an earlier start has left it."""
    if before:
        _state.before = True
    else:
        _state.now = True


def saved_now() -> bool:
    """Whether this start has saved anything: a client, a round, a file of tokens or images, a result."""
    return _state.now


def saved_before() -> bool:
    """Whether an earlier start has left anything to continue from."""
    return _state.before


def outlook() -> str:
    """What happens to the work of this process, which ends: the rest of a message, empty outside of a run."""
    if not _state.is_run:
        return ""
    if _state.now or _state.before:
        return f"; what is saved stays, and {_the_same('command')} continues from it"
    return f"; {_anew('command')}"


def continues(what: str = "command") -> str:
    """What the same command, or call, does after a stop."""
    return f"{_the_same(what)} continues" if not _state.is_run or _state.now or _state.before else _anew(what)


def _the_same(what: str) -> str:
    return f"the same {what}" if _state.resume == "auto" else f"the same {what} with resume=auto"


def _anew(what: str) -> str:
    return f"nothing was saved yet, and the same {what} begins anew"
