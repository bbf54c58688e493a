"""Classes by name: AllenNLP's `register`, `by_name` and `list_available`, one registry for each base class.

Knows nothing of influence.
"""

import difflib
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound=type)


class Registrable:
    """A base class whose subclasses can be had by name.

    Example:
        >>> class Shape(Registrable):
        ...     default_implementation = "square"
        >>> @Shape.register("circle")
        ... class Circle(Shape): ...
        >>> @Shape.register("square")
        ... class Square(Shape): ...
        >>> Shape.list_available()
        ['square', 'circle']
        >>> Shape.by_name("circle").__name__
        'Circle'
    """

    default_implementation: ClassVar[str] = ""
    _registry: ClassVar[dict[type, dict[str, tuple[type, str | None]]]] = {}

    @classmethod
    def register(cls, name: str, constructor: str | None = None, exist_ok: bool = False) -> Callable[[C], C]:
        """A class decorator: the class is `by_name(name)` from now on.

        Args:
            name: The name.
            constructor: The class method to construct it by, if not by calling the class.
            exist_ok: Whether a class of that name may be replaced.

        Returns:
            The decorator.

        Raises:
            ValueError: If the name is taken and `exist_ok` is False.
        """
        registry = Registrable._registry.setdefault(cls, {})

        def add(subclass: C) -> C:
            if name in registry and not exist_ok and not _same_source(registry[name][0], subclass):
                raise ValueError(
                    f"`{cls.__name__}.register({name!r})`: the name is taken by {registry[name][0].__name__}. "
                    "Pass exist_ok=True to replace it."
                )
            registry[name] = (subclass, constructor)
            return subclass

        return add

    @classmethod
    def by_name(cls, name: str) -> Callable[..., Any]:
        """The class registered under `name` here or at a base class, or the class method registered to construct it.

        Raises:
            ValueError: If there is none.
        """
        registry = cls._known()
        if name not in registry:
            close = difflib.get_close_matches(name, registry, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"`{cls.__name__}.by_name({name!r})`: no such name. {hint}Registered: {cls.list_available()}. "
                "A class registers itself when its module is imported."
            )
        subclass, constructor = registry[name]
        return getattr(subclass, constructor) if constructor else subclass

    @classmethod
    def list_available(cls) -> list[str]:
        """All names, the default implementation first."""
        return sorted(cls._known(), key=lambda name: name != cls.default_implementation)

    @classmethod
    def _known(cls) -> dict[str, tuple[type, str | None]]:
        """All that is registered at this class and its bases; the nearest wins."""
        bases = [base for base in reversed(cls.__mro__) if base in Registrable._registry]
        return {name: entry for base in bases for name, entry in Registrable._registry[base].items()}


def _same_source(old: type, new: type) -> bool:
    """Whether `new` is `old` from a module that was imported again, as notebooks do."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
