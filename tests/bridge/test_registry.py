import pytest

from bridge.registry import Registrable


def shapes():
    class Shape(Registrable):
        default_implementation = "square"

    @Shape.register("circle")
    class Circle(Shape):
        @classmethod
        def unit(cls):
            return "unit circle"

    @Shape.register("square")
    class Square(Shape):
        pass

    return Shape, Circle, Square


def test_names_and_the_default_first():
    shape, circle, square = shapes()
    assert shape.list_available() == ["square", "circle"]
    assert shape.by_name("circle") is circle
    assert shape.by_name("square") is square


def test_registries_are_apart():
    shapes()

    class Other(Registrable):
        pass

    assert Other.list_available() == []
    with pytest.raises(ValueError, match="no such name"):
        Other.by_name("circle")


def test_a_class_method_may_construct():
    shape, circle, _ = shapes()
    shape.register("unit circle", constructor="unit")(circle)
    assert shape.by_name("unit circle")() == "unit circle"


def test_a_name_is_taken_once():
    shape, circle, square = shapes()
    with pytest.raises(ValueError, match="taken by Circle"):
        shape.register("circle")(square)
    assert shape.by_name("circle") is circle
    shape.register("circle", exist_ok=True)(square)
    assert shape.by_name("circle") is square


def test_a_class_may_be_defined_again():
    shape, circle, _ = shapes()
    again = type("Circle", (shape,), {"__module__": circle.__module__, "__qualname__": circle.__qualname__})
    shape.register("circle")(again)
    assert shape.by_name("circle") is again
