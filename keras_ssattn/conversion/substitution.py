"""Changes for a while what calling a class gives.

This is the only file of the package that changes a class of another library. A layer that makes
attention itself calls `keras.layers.MultiHeadAttention(...)` in its constructor or in `build`.
Keras does not let anyone replace the result in a layer that is built. So the call must give the
new attention in the first place: for a while, the `__new__` of the class is replaced. Only the
thread that asked for it notices; in all other threads the class works as before.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

# For each class, a function that takes the arguments of the call and makes another object. If the
# object is an instance of the class, Python calls its `__init__` next, as after any `__new__`.
Makers: TypeAlias = Mapping[type, Callable[..., object]]


class _InThisThread(threading.local):
    makers: Makers | None = None


_current = _InThisThread()
_lock = threading.Lock()
_replaced: dict[type, int] = {}  # how many substitutions use the replaced `__new__` of a class
_own: dict[type, object] = {}  # the former `__new__` of a class, if the class itself defined it


@contextlib.contextmanager
def substituted(makers: Makers) -> Iterator[None]:
    """Inside this context, calling a class of `makers` calls its maker, in this thread only.

    An inner context hides the one around it.
    """
    with contextlib.ExitStack() as stack:
        for target in makers:
            _replace(target)
            stack.callback(_restore, target)
        stack.callback(setattr, _current, "makers", _current.makers)
        _current.makers = makers
        yield


def _replace(target: Any) -> None:
    with _lock:
        _replaced[target] = _replaced.get(target, 0) + 1
        if _replaced[target] > 1:
            return
        if "__new__" in vars(target):
            _own[target] = vars(target)["__new__"]
        original = target.__new__

        def new(cls: type, *args: Any, **kwargs: Any) -> object:
            make = (_current.makers or {}).get(cls)  # none for a subclass of `target`
            return original(cls, *args, **kwargs) if make is None else make(*args, **kwargs)

        target.__new__ = new


def _restore(target: Any) -> None:
    with _lock:
        _replaced[target] -= 1
        if _replaced[target]:
            return
        del _replaced[target]
        if target in _own:
            target.__new__ = _own.pop(target)
        else:
            del target.__new__
