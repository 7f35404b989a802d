"""What users and their type checkers see: the names of the package, the options of a call."""

import ast
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import calm_rt
from calm_rt.generation import Generator
from calm_rt.sequence import GenerationOptions, GivenOptions

TREE = ast.parse(Path(calm_rt.__file__).read_text())


def test_type_checkers_see_what_is_imported_late() -> None:
    [block] = [node for node in TREE.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        alias.name: node.module or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == calm_rt._LAZY
    [names] = [ast.literal_eval(node.value) for node in TREE.body if _assigns(node, "__all__")]
    assert names == calm_rt.__all__ and seen.keys() <= set(names), "a checker reads literals only"


def test_dir_has_the_public_names_before_and_after_they_are_imported() -> None:
    program = (
        "import calm_rt;"
        "names = dir(calm_rt);"
        "assert names == sorted([*calm_rt.__all__, '__version__']), names;"
        "[getattr(calm_rt, name) for name in names];"
        "assert dir(calm_rt) == names"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_options_of_a_call_are_those_of_generate() -> None:
    options = {field.name: field for field in fields(GenerationOptions)}
    assert list(GivenOptions.__annotations__) == list(options)
    assert GivenOptions.__required_keys__ == {"max_new_tokens"}
    arguments = signature(Generator.generate).parameters
    assert arguments.keys() - options.keys() == {"self", "prompts", "sequence_ids"}
    for name in options.keys() - GivenOptions.__required_keys__:
        assert arguments[name].annotation == GivenOptions.__annotations__[name], name
        assert arguments[name].default == options[name].default, name


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
