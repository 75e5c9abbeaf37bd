"""Reads pickles without letting them run anything.

A pickle is a program for a small stack machine. This is that machine without its powers: a name never leads to an
import but to what the caller's table holds for it; integers, lengths and calls have limits; keys are plain; and no
step copies more than it was given, so that time and memory stay within a small multiple of the pickle's own size
whatever it says. Python's own machine promises neither: one opcode can ask for a memo of gigabytes, and a key made of
shared tuples takes forever to hash.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

_MOST_ARGUMENTS = 16
_MOST_ATTRIBUTES = 100
_MOST_INTEGER = 16  # bytes


class Record:
    """A stand-in for any class: it keeps what it was made from and does nothing.

    Attributes:
        values: What the class was called with.
        state: Its attributes, which can also be had as attributes.
    """

    fields: frozenset[str] = frozenset()  # attributes that are known

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.state: Mapping[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the saved attributes: a dict, or a tuple of None and a dict."""
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
            state = state[1]
        if not isinstance(state, dict) or len(state) > _MOST_ATTRIBUTES:
            raise ValueError(f"a {type(self).__name__} has a {type(state).__name__} for its attributes, or too many of them")
        self.state = state

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["state"][name]
        except KeyError:
            raise AttributeError(f"a {type(self).__name__} without its {name}") from None


def unpickle(data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """What the pickle `data` describes.

    Args:
        data: The whole pickle.
        find: What stands in for a name (module, name); it raises ValueError for names that are refused. Callables among
            the stand-ins are called with what the pickle gives them, at most 16 arguments.
        persistent: What stands in for an object that is kept outside the pickle, given its id.

    Raises:
        ValueError: It is damaged, or asks for what plain data has no use for.
    """
    try:
        return _run(data, find, persistent)
    except (LookupError, TypeError, AttributeError, struct.error, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {str(error)[:100]!r})") from error


def _run(data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    at = 0

    while True:
        opcode = data[at]
        at += 1
        match opcode:  # the most frequent ones first
            case 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            case 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            case 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            case 0x29:  # EMPTY_TUPLE
                stack.append(())
            case 0x52 | 0x81:  # REDUCE, NEWOBJ
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            case 0x28:  # MARK
                marked.append(stack)
                stack = []
            case 0x62:  # BUILD
                state, target = stack.pop(), stack[-1]
                if isinstance(target, Record):
                    target.build(state)
                elif not isinstance(target, dict):  # attributes of a dict are of no use
                    raise ValueError(f"its pickle gives attributes to a {type(target).__name__}")
            case 0x8C:  # SHORT_BINUNICODE
                text, at = _cut(data, at, 1)
                stack.append(text.decode())
            case 0x7D:  # EMPTY_DICT
                stack.append({})
            case 0x75:  # SETITEMS
                items, stack = stack, marked.pop()
                _set(stack[-1], items)
            case 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            case 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            case 0x4D:  # BININT2
                stack.append(int.from_bytes(data[at : at + 2], "little"))
                at += 2
            case 0x4A:  # BININT
                stack.append(int.from_bytes(data[at : at + 4], "little", signed=True))
                at += 4
            case 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            case 0x72:  # LONG_BINPUT
                memo[int.from_bytes(data[at : at + 4], "little")] = stack[-1]
                at += 4
            case 0x4E:  # NONE
                stack.append(None)
            case 0x88 | 0x89:  # NEWTRUE, NEWFALSE
                stack.append(opcode == 0x88)
            case 0x74:  # TUPLE
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            case 0x5D | 0x8F:  # EMPTY_LIST, EMPTY_SET
                stack.append([])
            case 0x61:  # APPEND
                _extend(stack[-2], [stack.pop()])
            case 0x65 | 0x90:  # APPENDS, ADDITEMS
                items, stack = stack, marked.pop()
                _extend(stack[-1], items)
            case 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case 0x58:  # BINUNICODE
                text, at = _cut(data, at, 4)
                stack.append(text.decode())
            case 0x51:  # BINPERSID
                if persistent is None:
                    raise ValueError("its pickle refers to objects outside it")
                stack[-1] = persistent(stack[-1])
            case 0x8A:  # LONG1
                digits, at = _cut(data, at, 1)
                if len(digits) > _MOST_INTEGER:
                    raise ValueError(f"its pickle holds an integer of {len(digits)} bytes")
                stack.append(int.from_bytes(digits, "little", signed=True))
            case 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", data[at : at + 8])[0])
                at += 8
            case 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(_find(find, module, name))
            case 0x63:  # GLOBAL
                names = [data[at : data.index(b"\n", at)]]
                at += len(names[0]) + 1
                names.append(data[at : data.index(b"\n", at)])
                at += len(names[1]) + 1
                stack.append(_find(find, names[0].decode(), names[1].decode()))
            case 0x95:  # FRAME
                at += 8
            case 0x80:  # PROTO
                at += 1
            case 0x8D:  # BINUNICODE8
                text, at = _cut(data, at, 8)
                stack.append(text.decode())
            case 0x43:  # SHORT_BINBYTES
                text, at = _cut(data, at, 1)
                stack.append(text)
            case 0x42:  # BINBYTES
                text, at = _cut(data, at, 4)
                stack.append(text)
            case 0x30:  # POP
                stack.pop()
            case 0x31:  # POP_MARK
                stack = marked.pop()
            case 0x2E:  # STOP
                return stack.pop()
            case _:
                raise ValueError(f"its pickle uses opcode {bytes([opcode])!r}, which plain data has no use for; refused")


def _cut(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """The bytes behind a length of `width` bytes at `at`, and where they end."""
    start = at + width
    stop = start + int.from_bytes(data[at:start], "little")
    if stop > len(data):
        raise ValueError("its pickle ends early")
    return data[start:stop], stop


def _find(find: Callable[[str, str], Any], module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 200:
        raise ValueError("its pickle asks for something without a proper name")
    return find(module, name)


def _call(function: Any, arguments: Any) -> Any:
    if not callable(function):  # only what `find` gave can be called
        raise ValueError(f"its pickle calls a {type(function).__name__}")
    if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
        raise ValueError("its pickle calls something with more than it can take")
    return function(*arguments)


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise ValueError(f"its pickle sets items of a {type(target).__name__}")
    for key in items[::2]:
        if type(key) is not str and not isinstance(key, int | float | Record | None):
            raise ValueError(f"its pickle has a {type(key).__name__} as a key")
    target.update(zip(items[::2], items[1::2], strict=True))


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError(f"its pickle appends to a {type(target).__name__}")
    target.extend(items)


def refused(module: str, name: str, where: str) -> ValueError:
    """The error for a name that `where` has no use for."""
    asked = f"{module}.{name}"
    return ValueError(f"it asks for {asked if asked.isprintable() else repr(asked)}, which {where} has no use for; refused")
