"""User code keeps its own module names beside ours, and what goes wrong in it is told with file and line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fusion.errors import DataError, UserError
from fusion.user_code import load_entrypoint


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__slash__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def load(folder: Path, target: str):
    return load_entrypoint(target, folder, where="model.entrypoint")


def test_file_and_function(tmp_path):
    write(tmp_path, mine="def build(width=3):\n    return width * 2")
    assert load(tmp_path, "mine.py:build")(width=5) == 10


def test_package_and_function(tmp_path):
    write(tmp_path, pack_a__slash____init__="", pack_a__slash__inner="def build():\n    return 'inner'")
    assert load(tmp_path, "pack_a.inner:build")() == "inner"


def test_own_scheduler_worker_and_dag_win_for_the_user_and_ours_for_us(tmp_path):
    write(
        tmp_path,
        scheduler="WHOSE = 'theirs'\n",
        worker__slash____init__="from worker.parts import WHOSE\n",
        worker__slash__parts="WHOSE = 'their worker'\n",
        dag__slash____init__="import dag.deep\nfrom . import deep as again\n",
        dag__slash__deep="WHOSE = 'their dag'\n",
        model="""
            import importlib
            import scheduler
            from worker import WHOSE as WORKER

            def build():
                import dag.deep  # late, at call time
                from dag import deep
                return [scheduler.WHOSE, WORKER, dag.deep.WHOSE, deep.WHOSE, importlib.import_module("scheduler").WHOSE]
        """,
    )
    build = load(tmp_path, "model.py:build")
    assert build() == ["theirs", "their worker", "their dag", "their dag", "theirs"]

    import dag.cut
    import scheduler

    ours = Path(dag.cut.__file__).parent.parent
    assert Path(scheduler.__file__).parent.parent == ours
    assert build() == ["theirs", "their worker", "their dag", "their dag", "theirs"]


def test_the_entry_file_may_have_one_of_our_names(tmp_path):
    write(tmp_path, worker="import coordinator\ndef build():\n    return coordinator.X", coordinator="X = 4")
    assert load(tmp_path, "worker.py:build")() == 4
    assert load(tmp_path, "worker:build")() == 4


def test_names_that_the_folder_does_not_have_are_ours(tmp_path):
    write(
        tmp_path, model_b="def build():\n    import fusion, dag.graph\n    return fusion.__version__, dag.graph.OpDag"
    )
    version, op_dag = load(tmp_path, "model_b.py:build")()
    import fusion
    from dag.graph import OpDag

    assert (version, op_dag) == (fusion.__version__, OpDag)


def test_two_folders_with_files_of_the_same_name(tmp_path):
    for side in ("left", "right"):
        write(
            tmp_path,
            **{
                f"{side}__slash__helpers_x": f"WHOSE = {side!r}",
                f"{side}__slash__m": "import helpers_x\n\ndef build():\n    import helpers_x as late\n"
                "    return helpers_x.WHOSE, late.WHOSE",
            },
        )
    left, right = load(tmp_path, "left/m.py:build"), load(tmp_path, "right/m.py:build")
    assert (left(), right()) == (("left", "left"), ("right", "right"))


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_a_script_with_its_own_scheduler_can_use_fusion(tmp_path, order):
    """Plain Python puts a script's folder first on the path; our code must still find itself."""
    first, second = ("import scheduler", "import fusion.import_views")
    if order == "ours first":
        first, second = second, first
    write(
        tmp_path,
        scheduler="WHOSE = 'theirs'",
        dag="WHOSE = 'theirs'",
        script=f"""
            {first}
            {second}
            fusion.import_views.claim_our_names()
            import scheduler
            assert scheduler.WHOSE == 'theirs'
            from fusion.client import Client
            import importlib, sys
            ours = sys.modules["dag"]
            assert ours.__file__.endswith("dag/__init__.py"), ours
            import dag
            assert dag.WHOSE == "theirs"
            print("fine")
        """,
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def error_of(folder: Path, target: str, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, target)(**kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors(tmp_path):
    write(
        tmp_path,
        bad_models="""
            def build(width=1):
                return broken(width)

            def broken(width):
                raise RuntimeError("no luck")
        """,
        raises="x = 1\nraise ValueError('on import')\n",
        lines="raise RuntimeError('Error(s) in loading state_dict:\\n\\tMissing key(s): head.weight')\n",
        syntax="def f(:\n",
        lacking="import surely_not_installed\n",
        leaves="import sys\n\ndef build():\n    sys.exit(0)\n",
        leaves_at_once="import sys\nsys.exit(0)\n",
    )
    assert "no such file" in error_of(tmp_path, "nope.py:build")
    assert "did you mean 'bad_models.py'" in error_of(tmp_path, "bad_model.py:build")
    assert "did you mean 'build'" in error_of(tmp_path, "bad_models.py:bild")
    assert "write file.py:function" in error_of(tmp_path, "bad_models.py")
    assert "no module 'not_here'" in error_of(tmp_path, "not_here:f")
    assert "did you mean 'width'" in error_of(tmp_path, "bad_models.py:build", wdith=1)
    assert "bad_models.py:6: RuntimeError: no luck" in error_of(tmp_path, "bad_models.py:build")
    assert "raises.py:2: ValueError: on import" in error_of(tmp_path, "raises.py:f")
    assert "loading state_dict: Missing key(s): head.weight" in error_of(tmp_path, "lines.py:f")
    assert "syntax.py:1: SyntaxError" in error_of(tmp_path, "syntax.py:f")
    assert "leaves.py:4: SystemExit: 0" in error_of(tmp_path, "leaves.py:build")
    assert "leaves_at_once.py:2: SystemExit: 0" in error_of(tmp_path, "leaves_at_once.py:f")
    message = error_of(tmp_path, "lacking.py:f")
    assert "imports 'surely_not_installed', which is not installed" in message
    assert "lacking.py:1" in message


def test_the_cause_and_the_kind_of_error_are_kept(tmp_path):
    write(tmp_path, data_c="def rows():\n    return 1 / 0")
    with pytest.raises(DataError) as caught:
        load_entrypoint("data_c.py:rows", tmp_path, where="data.entrypoint", error=DataError)()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
