import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "mtpo": set(),
    "sandbox": {"mtpo"},
    "data": {"mtpo"},
    "eval": {"mtpo", "data"},
    "recipes": {"mtpo", "sandbox", "data", "eval"},
    "benchmarks": {"mtpo", "sandbox", "data", "eval", "recipes", "tests"},
}
FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in FILES
    if p.name != "__main__.py"
]


def imported_packages(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    other_rooms = imported_packages(path.read_text()) & (set(MAY_IMPORT) | {"tests", "benchmarks"}) - {room}
    assert other_rooms <= MAY_IMPORT[room]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_mtpo_imports_without_torch() -> None:
    assert "torch" not in modules_loaded_by(
        "import mtpo, mtpo.trajectory, mtpo.chat, mtpo.rollout, mtpo.grader"
    )


def test_no_room_imports_vllm_ray_or_peft() -> None:
    optional = {"vllm", "ray", "peft"}
    for path in FILES:
        module_level = ast.Module(
            [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)], []
        )
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        module_level.body = [n for n in module_level.body if not isinstance(n, functions)]
        assert not optional & imported_packages(ast.unparse(module_level)), path
    # The trainers of transformers and TRL load peft themselves where it is installed.
    trains = ("recipes.", "mtpo.training", "mtpo.integrations", "benchmarks.train_step")
    light = [m for m in MODULES if not m.startswith(trains)]
    assert not optional & modules_loaded_by("import " + ", ".join(light))


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    assert not {p.name for p in FILES} & {"utils.py", "helpers.py", "common.py", "misc.py"}
