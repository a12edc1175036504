"""The import rule of lowmem/__init__.py, and that files and functions stay small. python -m pytest tests/test_imports.py"""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "lowmem").rglob("*.py"))
SCRIPTS = [ROOT / "finetune_base.py", ROOT / "finetune_lowmem.py"]
FILES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in [*PACKAGE, *SCRIPTS, ROOT / "common.py"]}


def imported(file):
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name} imports by dots"
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else node.module for name in whole}
    return found & FILES.keys()


IMPORTS = {module: imported(file) for module, file in FILES.items()}


OWN_DATA_KNOWS = {
    f"lowmem.training.{name}" for name in ("batches", "data", "errors", "parallel", "source", "tokenizing")
}


def is_training(module):
    return module.startswith("lowmem.training")


def is_own_data(module):
    return module.startswith("lowmem.data")


def test_arrows_point_down():
    for module, found in IMPORTS.items():
        if is_training(module):
            assert all(map(is_training, found)), module
        elif is_own_data(module):
            assert all(is_own_data(m) or m in OWN_DATA_KNOWS for m in found), module
        elif module.startswith("lowmem"):
            assert "common" not in found, module
            assert not any(map(is_own_data, found)), module
        assert not found & {"finetune_base", "finetune_lowmem"}, module
    assert {m for m in IMPORTS["common"] if not is_training(m)} == {
        f"lowmem.data.{name}" for name in ("facts", "files", "own")
    }
    assert {m for m in IMPORTS["finetune_base"] if not is_training(m)} == {"common", "lowmem.adafactor"}


def test_training_s_files_import_only_those_named_before():
    _, _, text = ast.get_docstring(ast.parse(FILES["lowmem.training.__init__"].read_text())).partition("\n")
    files = {f.stem for f in PACKAGE if f.parent.name == "training"} - {"__init__"}
    order = [name for names in re.findall(r"((?:\w+,\s)*\w+):", text) for name in re.split(r",\s", names)]
    assert sorted(order) == sorted(files), "the docstring names each file once"
    for number, name in enumerate(order):
        assert {m.removeprefix("lowmem.training.") for m in IMPORTS[f"lowmem.training.{name}"]} <= set(order[:number])


def test_there_are_no_circles():
    left = dict(IMPORTS)
    while ready := [module for module, found in left.items() if not found & left.keys()]:
        left = {module: found for module, found in left.items() if module not in ready}
    assert not left


def test_no_test_imports_another():
    for file in (ROOT / "tests").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(from|import) (tests\.)?(test_\w+|conftest)\b", text, re.MULTILINE), file


def test_files_and_functions_are_small():
    for file in PACKAGE:
        assert len(file.read_text().splitlines()) <= 450, file
    for name, most in (("finetune_lowmem", 250), ("finetune_base", 120), ("common", 420)):
        assert len(FILES[name].read_text().splitlines()) <= most, name
    functions = [
        node
        for file in FILES.values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 200
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 80]


def test_the_scripts_differ_by_the_techniques_alone():
    """As many lines as `diff` prints, with a line to say where each change is."""
    base, lowmem = (script.read_text().splitlines() for script in SCRIPTS)
    changes = [c for c in difflib.SequenceMatcher(None, base, lowmem, autojunk=False).get_opcodes() if c[0] != "equal"]
    assert sum(1 + (c[0] == "replace") + c[2] - c[1] + c[4] - c[3] for c in changes) <= 220


def test_importing_the_scripts_does_nothing():
    code = "import sys, finetune_base, finetune_lowmem; assert not {'transformers', 'datasets', 'cut_cross_entropy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
