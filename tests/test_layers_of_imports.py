"""The core knows no Ray: it imports and trains where Ray is not installed."""

import subprocess
import sys

CORE = (
    "hrm_ray.api",
    "hrm_ray.cli",
    "hrm_ray.config.compose",
    "hrm_ray.data.page",
    "hrm_ray.data.recipe",
    "hrm_ray.data.sampler",
    "hrm_ray.data.shards",
    "hrm_ray.data.writer",
    "hrm_ray.data.sources",
    "hrm_ray.data.rows",
    "hrm_ray.data.tasks.arc",
    "hrm_ray.data.tasks.arc.builder",
    "hrm_ray.data.tasks.grid.builder",
    "hrm_ray.data.tasks.maze.builder",
    "hrm_ray.data.tasks.modular.builder",
    "hrm_ray.data.tasks.sudoku",
    "hrm_ray.data.tasks.sudoku.builder",
    "hrm_ray.doctor",
    "hrm_ray.evaluation.pass_at_k",
    "hrm_ray.evaluation.saved_outputs",
    "hrm_ray.evaluation.submission",
    "hrm_ray.interop.checkpoint",
    "hrm_ray.interop.dataset",
    "hrm_ray.interop.look",
    "hrm_ray.models.registry",
    "hrm_ray.optim.muon",
    "hrm_ray.scale.report",
    "hrm_ray.evaluation.evaluate",
    "hrm_ray.storage.storage",
    "hrm_ray.training.loop",
    "hrm_ray.training.launch",
)
# Rooms that training stands on.
BELOW = (
    "hrm_ray.models.trm",
    "hrm_ray.optim.adam_atan2",
    "hrm_ray.storage.storage",
    "hrm_ray.data.shards",
    "hrm_ray.data.placing",
    "hrm_ray.evaluation.saved_outputs",
    "hrm_ray.evaluation.pass_at_k",
    "hrm_ray.evaluation.submission",
)
# Makes `import ray` fail as if it were not there.
NO_RAY = "import sys; sys.modules['ray'] = None; "


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", NO_RAY + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports():
    run(f"import importlib; [importlib.import_module(m) for m in {CORE}]")


def test_trains_and_solves(tmp_path):
    run(
        "from pathlib import Path; from tests.toy import *; import hrm_ray\n"
        "from hrm_ray.config.schema import TrainConfig; from hrm_ray.training.launch import train\n"
        f"root = Path({str(tmp_path)!r}); toy_dataset(root / 'data')\n"
        "train(TrainConfig(**toy_config(root / 'data', root / 'runs')), show_progress=False)\n"
        "assert len(hrm_ray.load(root / 'runs/toy').solve(['1 2 3 4 ' * 4])) == 1\n"
        "assert 'torch._dynamo' not in sys.modules"  # nothing was compiled; to import it takes a second
    )


def test_rooms_below_do_not_import_training():
    run(
        f"import importlib\nfor room in {BELOW}:\n"
        "    importlib.import_module(room)\n"
        "    above = [m for m in sys.modules if m.startswith(('hrm_ray.training', 'hrm_ray.cli'))]\n"
        "    assert not above, (room, above)"
    )
