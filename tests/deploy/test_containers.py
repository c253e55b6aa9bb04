"""Dockerfile and compose file: the image runs our commands as nobody special, and every setting is one that we read."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from command_lines import DEPLOY, ROOT, known_variables, parsed, variables_in
from compose_spec import PyCompose

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
COORDINATOR, WORKER = COMPOSE["services"]["coordinator"], COMPOSE["services"]["worker"]


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_image_holds_every_package_and_nothing_else() -> None:
    copied = {line.split()[0] for line in instructions("COPY") if not line.startswith(("--from", "pyproject"))}
    packages = {folder.name for folder in ROOT.iterdir() if (folder / "py.typed").exists()}
    assert copied == packages
    admitted = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert admitted == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def test_the_image_runs_as_a_plain_user_and_can_be_built_for_both_kinds_of_machine() -> None:
    assert instructions("FROM")[-1] == "python:${PYTHON_VERSION}-slim"
    user = instructions("USER")[-1].partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert f"--uid {user}" in DOCKERFILE
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("ENTRYPOINT") == ['["fusion"]']
    assert "ACCELERATOR=cpu" in instructions("ARG")
    assert re.search(r"cpu\).*--extra-index-url.*cuda\) index=\"\"", DOCKERFILE, re.DOTALL)
    # No secret is baked in.
    assert not re.search(r"FUSION_(JOIN_)?TOKEN", DOCKERFILE)


def test_every_setting_is_one_that_a_command_reads() -> None:
    assert variables_in(DOCKERFILE) <= known_variables()
    assert variables_in(COMPOSE_TEXT) - {"FUSION_VERSION"} <= known_variables()


def test_services_start_with_command_lines_that_we_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: value for text in instructions("ENV") for name, value in re.findall(r"(FUSION_\w+)=(\S+)", text)}
    settings = parsed(monkeypatch, COORDINATOR["command"], {**ours, "FUSION_TOKEN": "o", "FUSION_JOIN_TOKEN": "j"})
    assert (settings["host"], settings["port"], settings["join_token"]) == ("0.0.0.0", 8760, "j")
    assert str(settings["state"]).startswith(COORDINATOR["volumes"][0].partition(":")[2])
    settings = parsed(monkeypatch, WORKER["command"], {"FUSION_TOKEN": "j", "FUSION_THREADS": "1"})
    assert settings["join"] == f"http://coordinator:{COORDINATOR['command'][4]}"
    assert settings["token"] == "j"


def test_three_workers_are_given_the_join_token_only_and_time_to_leave() -> None:
    assert WORKER["deploy"]["replicas"] == 3
    assert "FUSION_JOIN_TOKEN" in WORKER["environment"]["FUSION_TOKEN"]
    assert int(WORKER["stop_grace_period"].rstrip("s")) > 90
    assert all(port.startswith("127.0.0.1:") for port in COORDINATOR["ports"])
    for service in (COORDINATOR, WORKER):
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        # Required variables: compose refuses to start without them.
        assert all(":?" in value for name, value in service["environment"].items() if "TOKEN" in name)


def interpolated(text: str) -> str:
    """The compose file as compose sees it: variables have their default, and required ones some value."""
    return re.sub(r"\$\{\w+:([-?])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "given", text)


def validate(text: str) -> None:
    """Raises `ValueError` for what the Compose specification does not allow."""
    # Merge keys are YAML's: written out before the specification is asked.
    whole = PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(interpolated(text))))
    whole.validate()
    whole.validate_networks()


def test_the_compose_file_is_of_the_specification() -> None:
    validate(COMPOSE_TEXT)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("restart: unless-stopped", "restart: sometimes"),
        ("read_only:", "readonly:"),
        ("stop_grace_period: 20s", "stop_grace_period: soon"),
        ("networks: [pool]", "networks: [elsewhere]"),
    ],
)
def test_the_specification_would_notice_a_mistake(right: str, wrong: str) -> None:
    assert right in COMPOSE_TEXT
    with pytest.raises(ValueError, match=r"\S"):
        validate(COMPOSE_TEXT.replace(right, wrong))


def test_compose_takes_the_file() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("needs docker compose")
    subprocess.run(
        ["docker", "compose", "-f", DEPLOY / "compose.yaml", "config", "--quiet"],
        check=True,
        env={"FUSION_TOKEN": "o", "FUSION_JOIN_TOKEN": "j", "PATH": "/usr/bin:/bin:/usr/local/bin"},
    )
