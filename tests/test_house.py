"""The rules of the house, held by a test: imports go down, importing costs nothing, the README's map is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chiasm

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "chiasm"

# From the top down: a file imports from floors below its own, and from its own room.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"verbs"},
    {"engine"},
    {"evaluation", "serving"},
    {"report"},
    {"explaining"},
    {"predictor", "works"},
    {"model_file"},
    {"tasks", "inference", "measure", "paired"},
    {"apart"},
    {"models", "data"},
    {"layers"},
    {"config"},
    {"results", "errors"},
    {"__init__"},
]
FILES = sorted(SOURCE.rglob("*.py"))


def _floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _rooms_imported(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            of_package = [
                f"chiasm.{alias.name}" for alias in node.names if (SOURCE / alias.name).with_suffix(".py").exists()
            ]
            modules += of_package if node.module == "chiasm" else [str(node.module)]
    return [module.split(".")[1] for module in modules if module.startswith("chiasm.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    # Verbs do not import each other; the demonstration alone is made of other verbs.
    among_own = own != "verbs" or path.name == "demo.py"
    for room in _rooms_imported(path):
        assert (room == own and among_own) or _floor(room) > _floor(own), (
            f"{path.name} of '{own}' imports from '{room}'"
        )


def test_help_needs_no_torch() -> None:
    """`chiasm --help`, the settings and the public surface come without the heavy libraries."""
    code = (
        "import sys, chiasm, chiasm.cli, chiasm.config; "
        "[chiasm.cli.main(words) for words in (['--help'], ['train', '--help'], ['train', '--print-config'])]; "
        "heavy = {'torch', 'timm', 'torchvision', 'pytorch_lightning', 'matplotlib'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists() -> None:
    for name in chiasm.__all__:
        assert getattr(chiasm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = chiasm.trian


def test_the_readmes_map_is_true() -> None:
    """Every source file stands in the README's tree with a caption, and nothing that is not there does."""
    tree = re.search(r"^src/chiasm/\n(.*?)^tests/", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert tree is not None
    folder, shown = "", set()
    for line in tree[1].splitlines():
        depth, name, caption = re.fullmatch(r"( +)(\S+)\s{2,}(\S.*)", line).groups()  # type: ignore[union-attr]
        assert caption
        folder = folder if len(depth) > 2 else (name if name.endswith("/") else "")
        shown.add(name if name == folder else folder + name)
    files = {str(path.relative_to(SOURCE)) for path in FILES if path.name != "__init__.py"}
    assert shown == files | {f"{path.parent.name}/" for path in FILES if path.parent != SOURCE}


DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
EXAMPLES = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in DOCS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_of_the_documentation_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})


COMMANDS = [
    pytest.param(line, id=f"{path.stem}: {line[:60]}")
    for path in DOCS
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if line.startswith("chiasm ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documentation_are_accepted(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `chiasm ...` line in the documentation uses verbs and options that exist."""
    import shlex

    from chiasm.cli import main

    words = shlex.split(re.split(r"\s[|>]|\s#", line)[0])[1:]
    assert main([*words, "--print-config"] if words and not words[0].startswith("-") else words) == 0, (
        capsys.readouterr()
    )
