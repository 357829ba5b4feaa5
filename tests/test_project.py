"""What holds for the repository as a whole."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import evaluator
import extract_features
import image_generator
import image_generator_ddp
import train_mask_adan

# The floors of docs/architecture.md, from the lowest. A module imports from lower floors only;
# modules of one package may import one another.
FLOORS = [
    {"utils"},
    {"data", "metrics"},
    {"nn"},
    {"amm", "masking"},
    {"models", "baselines"},
    {"registry", "diffusion"},
    {"checkpoints", "sampling"},
    {"training"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ONLY_UTILS = {"diffusion", "data", "metrics"}  # each can be used without the rest
TOP_LEVEL_MODULES = {"__init__.py", "amm.py", "masking.py", "models.py", "registry.py"}
SCRIPTS = {
    script.__name__: script
    for script in (
        train_mask_adan,
        extract_features,
        image_generator_ddp,
        image_generator,
        evaluator,
    )
}


def imported(path: Path) -> set[str]:
    """Modules (or packages) of edt that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").startswith("edt.")
        ):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "edt":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("edt.")
            }
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return names


def test_imports_go_down_the_floors():
    seen = set()
    for path in (ROOT / "edt").rglob("*.py"):
        module = path.relative_to(ROOT / "edt").parts[0].removesuffix(".py")
        if module == "__init__":  # the public entry, loaded when first used
            continue
        seen.add(module)
        for other in imported(path) - {module, "__version__"}:
            assert FLOOR_OF[other] < FLOOR_OF[module], f"{path} imports {other}"
            if module in ONLY_UTILS:
                assert other == "utils", f"{path} imports {other}"
    assert seen == set(FLOOR_OF)


def test_only_the_papers_ideas_and_the_registry_stand_at_the_top():
    assert {path.name for path in (ROOT / "edt").glob("*.py")} == TOP_LEVEL_MODULES


def test_files_and_functions_are_short():
    """A place to reconsider is over 400 lines a file, 60 a function, 120 a script."""
    for path in [*(ROOT / "edt").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}:{node.lineno} {node.name}"
    for script in ROOT.glob("*.py"):
        assert script.read_text().count("\n") <= 120, script


def test_the_library_neither_prints_nor_unpickles():
    for path in (ROOT / "edt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                is_command_line = path.parent.name == "cli"
                assert name != "print" or is_command_line, f"{path}:{node.lineno}"
                if name == "torch.load":
                    assert options["weights_only"] == "True", f"{path}:{node.lineno}"
                if name == "np.load":
                    assert options["allow_pickle"] == "False", f"{path}:{node.lineno}"


def test_environment_and_pyproject_name_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert sorted(conda[-1]["pip"]) == sorted(expected)
    named = {re.split("[<>=]", package)[0] for package in expected}
    assert named >= {
        "torch",
        "torchvision",
        "timm",
        "diffusers",
        "accelerate",
        "adan-pytorch",
        "numpy",
        "scipy",
        "tensorflow",
    }


def readme_commands() -> list[str]:
    """The lines of README's and the docs' shell blocks, continued lines joined."""
    blocks = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks += re.findall(r"```(?:bash|sh|shell)\n(.*?)```", path.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize("command", readme_commands())
def test_every_documented_command_is_one_that_works(command):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and (ROOT / word).exists()]
    if words[0] == "make":
        assert all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            for target in words[1:]
        )
    elif scripts and Path(words[scripts[0]]).stem in SCRIPTS:
        assert words[0] in ("python", "torchrun", "accelerate")
        script = SCRIPTS[Path(words[scripts[0]]).stem]
        parse = script.parse if script is evaluator else script.parser().parse_args
        parse(words[scripts[0] + 1 :])
        # Without it, the same command starts over instead of continuing.
        assert script is not train_mask_adan or "--run-dir" in words
    elif scripts:
        assert words[0] == "python"
    else:
        assert words[0] in ("git", "cd", "pip", "conda", "curl"), (
            f"README names an unknown command: {command}"
        )
    assert not [word for word in words if word.endswith(".py") and not (ROOT / word).exists()]
