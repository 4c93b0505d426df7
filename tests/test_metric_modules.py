"""The `evaluate` modules load from their folders without network and agree with the functions they wrap."""

import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest

MODULES = files("syncmask.evaluation") / "evaluate_modules"
CALLS = {
    "recall_at_k": {"predictions": [[0.9, 0.5], [0.1, 0.3, 0.3]], "references": [[0, 1], [0, 1, 0]], "k": [1, 2]},
    "fixed_macro_f1": {"predictions": ["a", "b", "a"], "references": ["a", "b", "b"], "labels": ["a", "b", "c"]},
    "masked_word_precision": {"predictions": [[2.0, 1.0, 0.0]], "references": [[1, 0, 0]]},
}
EXPECTED = {
    "recall_at_k": {"recall@1": 0.0, "recall@2": 1.0},
    "fixed_macro_f1": {"accuracy": 2 / 3, "macro_f1": 2 / 3},
    "masked_word_precision": {"precision": 1.0, "random": 1 / 3, "gain": 2 / 3},
}
SCRIPT = """
import json, sys
import evaluate
folder, calls = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps({name: evaluate.load(f"{folder}/{name}").compute(**call) for name, call in calls.items()}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    command = [sys.executable, "-c", SCRIPT, str(MODULES), json.dumps(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(CALLS))
def test_a_module_loads_offline_and_computes(found, name):
    for figure, value in EXPECTED[name].items():
        assert found[name][figure] == pytest.approx(value)
    ends = [key for key in found[name] if key.endswith("_low")]
    assert ends and all(found[name][low] <= found[name][low.replace("_low", "_high")] for low in ends)


def test_every_module_is_tested():
    names = {folder.name for folder in MODULES.iterdir() if (folder / f"{folder.name}.py").is_file()}
    assert names == set(CALLS)
