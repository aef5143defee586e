"""Every public name says what it is, and what it takes, gives and raises."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

import spectral_ops
from spectral_ops import optim, structures

NAMESPACES = (spectral_ops, optim, structures)
PUBLIC = {f"{space.__name__}.{name}": getattr(space, name) for space in NAMESPACES for name in space.__all__}
CLASSES = {name: x for name, x in PUBLIC.items() if inspect.isclass(x)}
FUNCTIONS = {name: x for name, x in PUBLIC.items() if not inspect.isclass(x)}
CALLED = ("step", "zero_grad", "load_state_dict", "observe")  # of an optimizer; its other methods are for who writes one


def members(cls: type) -> dict[str, Any]:
    """Public methods and properties that are ours."""
    found = {}
    for name in dir(cls):
        owner = next(c for c in cls.__mro__ if name in vars(c))
        member = vars(owner)[name]
        kind = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
        if kind and not name.startswith("_") and owner.__module__.startswith("spectral_ops"):
            found[name] = getattr(cls, name)
    return found


MEMBERS = {f"{name}.{member}": x for name, cls in CLASSES.items() for member, x in members(cls).items()}


def called(name: str) -> bool:
    """By users, with arguments. Of structures the class says what all methods take."""
    owner, _, method = name.rpartition(".")
    return not issubclass(CLASSES[owner], structures.Structure) and (
        method in CALLED or not issubclass(CLASSES[owner], torch.optim.Optimizer)
    )


METHODS = {name: x for name, x in MEMBERS.items() if callable(x) and called(name)}
WITH_METHODS = FUNCTIONS | METHODS
CONSTRUCTED = [name for name, cls in CLASSES.items() if not inspect.isabstract(cls) and cls is not optim.ParamGroups]
OPTIMIZERS = [name for name, cls in CLASSES.items() if issubclass(cls, torch.optim.Optimizer)]


def section(text: str, title: str) -> str:
    """What is indented under a title."""
    return textwrap.dedent("".join(re.findall(rf"^{title}:\n((?:    .*\n|\n)+)", f"{text}\n", re.M)))


def arguments(text: str) -> list[str]:
    return re.findall(r"^(\w+): \S", section(text, "Args"), re.M)


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def body(function: Callable[..., Any]) -> list[ast.AST]:
    return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))))


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_it_has_a_docstring(name):
    text = inspect.getdoc((PUBLIC | MEMBERS)[name])
    assert text and text.strip().splitlines()[0].strip()


@pytest.mark.parametrize("name", WITH_METHODS)
def test_a_function_names_its_parameters_in_order(name):
    function = WITH_METHODS[name]
    assert arguments(inspect.getdoc(function) or "") == parameters(function)


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_class_names_the_parameters_of_its_constructor(name):
    """What a function returns has attributes in their place."""
    text = inspect.getdoc(CLASSES[name]) or ""
    named = arguments(text) or re.findall(r"^(\w+): \S", section(text, "Attributes"), re.M)
    assert named == parameters(CLASSES[name])


@pytest.mark.parametrize("name", WITH_METHODS)
def test_a_function_says_what_it_returns(name):
    """Without arguments the first line does, as of a property."""
    function = WITH_METHODS[name]
    text = inspect.getdoc(function) or ""
    result = inspect.signature(function).return_annotation
    if result in (None, "None"):
        assert not section(text, "Returns")
    elif parameters(function):
        assert section(text, "Returns")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_checks_says_what_it_raises(name):
    assert re.search(r"^\w+(, \w+)*: \S", section(inspect.getdoc(FUNCTIONS[name]) or "", "Raises"), re.M)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_a_raise_says_so(name):
    raised = {
        node.exc.func.id
        for node in body(METHODS[name])
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    text = section(inspect.getdoc(METHODS[name]) or "", "Raises")
    assert all(error in text for error in raised), raised


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_says_what_it_raises_and_whose_it_is(name):
    text = inspect.getdoc(CLASSES[name]) or ""
    assert "ValueError" in section(text, "Raises") and re.search(r"20\d\d", text)
