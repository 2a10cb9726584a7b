"""The pack as strangers get it: its name, its version, what is packed, the forms and workflows of its forge."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packing import packed, tracked

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")

ROOT = Path(__file__).parents[1]
DESCRIPTION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, BUILD = DESCRIPTION["project"], DESCRIPTION["build-system"]
FORGE = ROOT / ".github"
FORMS = sorted((FORGE / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS, SUBGRAPHS = (sorted((ROOT / folder).glob("*.json")) for folder in ("workflows", "subgraphs"))
OLD_ID = "comfyui-inf-dit"  # before the first publication; in workflows that were saved then


def read(path: Path) -> dict:
    yaml = pytest.importorskip("yaml", reason="no package of ours needs it, but one of theirs mostly brings it")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(name: str) -> dict:
    return read(FORGE / "workflows" / name)["jobs"]


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


# ---- name and version


def test_name_is_one_that_the_registry_takes() -> None:
    """https://docs.comfy.org/registry/specifications; and never with the word that all of them could have."""
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", PROJECT["name"])
    assert len(PROJECT["name"]) < 100
    assert "comfy" not in PROJECT["name"].lower()
    assert {"Repository", "Documentation", "Bug Tracker"} <= PROJECT["urls"].keys()


def pack_ids(drawn: dict) -> set[str | None]:
    """Of the pack's nodes, those in subgraphs too, and of nodes that are such a subgraph."""
    inside = drawn.get("definitions", {}).get("subgraphs", [])
    nodes = [node for graph in (drawn, *inside) for node in graph["nodes"]]
    ours = {graph["id"] for graph in inside if pack_ids(graph)}
    return {
        node["properties"].get("cnr_id") for node in nodes if node["type"].startswith("InfDiT") or node["type"] in ours
    }


@pytest.mark.parametrize("path", [*WORKFLOWS, *SUBGRAPHS], ids=lambda path: path.stem)
def test_workflows_name_the_pack_that_is_to_be_installed(path: Path) -> None:
    assert pack_ids(json.loads(path.read_text(encoding="utf-8"))) == {PROJECT["name"]}


def test_ids_in_subgraphs_are_seen() -> None:
    drawn = json.loads(SUBGRAPHS[0].read_text(encoding="utf-8"))
    for nodes in (drawn["nodes"], drawn["definitions"]["subgraphs"][0]["nodes"]):
        for node in nodes:
            kept = node["properties"].pop("cnr_id")
            assert pack_ids(drawn) == {PROJECT["name"], None}
            node["properties"]["cnr_id"] = kept


def test_a_workflow_of_the_old_name_is_kept_to_be_opened() -> None:
    """tests/comfy opens it in ComfyUI's page and runs it, under the new name of the folder."""
    saved = ROOT / "tests" / "comfy" / "data" / "saved_2026_11.json"
    assert pack_ids(json.loads(saved.read_text(encoding="utf-8"))) == {OLD_ID}
    assert f'PACK = "{PROJECT["name"]}"' in (ROOT / "tests" / "comfy" / "conftest.py").read_text(encoding="utf-8")


def test_changelog_begins_with_the_version() -> None:
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


# ---- what is packed


def test_pack_holds_what_a_user_needs_and_nothing_else() -> None:
    """tests/comfy installs it and runs it."""
    files = packed()
    assert {path.split("/")[0] for path in files if "/" in path} == {
        "api_client", "docs", "infdit", "locales", "nodes", "pictures", "subgraphs", "web", "workflows",
    }  # fmt: skip
    assert {path for path in files if "/" not in path} == {
        "CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt",
    }  # fmt: skip
    pages = {"api", "errors", "memory", "migrating", "mini", "models", "sampling", "scaling"}
    assert {path for path in files if path.startswith("docs/")} == {
        "docs/before_after.png", "docs/in_comfyui.jpg", *(f"docs/{page}.md" for page in pages),
    }  # fmt: skip
    assert sum((ROOT / path).stat().st_size for path in files) < 11e6, "8 MB of it is the bundled model"


def test_comfy_cli_finds_nothing_wrong_and_packs_the_same(tmp_path: Path) -> None:
    """As `comfy node publish` does it, on a clone of what is committed."""
    comfy = os.environ.get("COMFY_CLI") or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is neither on PATH nor in COMFY_CLI")
    clone = tmp_path / "inf-dit"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)

    def run(word: str) -> str:
        command = [comfy, "--skip-prompt", "node", word]
        environment = {**os.environ, "DO_NOT_TRACK": "1"}
        return subprocess.check_output(command, cwd=clone, env=environment, stderr=subprocess.STDOUT, text=True)

    said = run("validate")  # it ends with 0 on warnings too
    assert "passed successfully" in said
    assert "warning" not in said.lower(), said
    run("pack")
    with zipfile.ZipFile(clone / "node.zip") as archive:
        assert sorted(archive.namelist()) == sorted(packed(clone))


# ---- the forge


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_form_asks_for_the_report_first(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    first, ids = form["body"][0], [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert (first["id"], first["validations"]["required"]) == ("report", True)
    assert '"report" output' in first["attributes"]["description"]
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert field["attributes"]["label"]


def test_forms_are_there() -> None:
    assert [path.stem for path in FORMS] == ["bug", "picture"]


def test_forge_runs_what_must_hold_and_the_readmes_test_command_on_three_pythons_and_two_pytorches() -> None:
    everything, suite = jobs("tests.yml")["everything"], jobs("tests.yml")["suite"]
    assert commands(everything) == ["bash .ci/run"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (test,) = re.findall(r"\n## Tests\n[^`#]+```sh\n(.+)\n```", readme)
    assert commands(suite)[-1] == test
    matrix = suite["strategy"]["matrix"]
    assert len(matrix["python"]) == 3
    assert len(matrix["torch"]) == 2
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert f"torch>={matrix['torch'][0].removesuffix('.*')}" in PROJECT["dependencies"]


@pytest.mark.parametrize(("torch", "held"), [("2.4.*", "torch==2.4.*"), (">=2.4", "torch>=2.4")])
def test_a_pytorch_of_the_matrix_is_held(tmp_path: Path, torch: str, held: str) -> None:
    hold = commands(jobs("tests.yml")["suite"])[0]
    subprocess.run(["bash", "-ec", hold], cwd=tmp_path, env={**os.environ, "TORCH": torch}, check=True)
    assert (tmp_path / "constraint.txt").read_text().strip() == held


def test_forge_runs_the_suite_on_the_oldest_of_everything() -> None:
    job, suite = jobs("tests.yml")["floors"], jobs("tests.yml")["suite"]
    assert commands(job) == ["bash .ci/floors > constraint.txt", commands(suite)[-1]]
    assert job["env"]["PIP_CONSTRAINT"].endswith("/constraint.txt")
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    assert PROJECT["requires-python"] == f">={python}"


def test_floors_are_those_of_the_project() -> None:
    extras = [wanted for extra in PROJECT["optional-dependencies"].values() for wanted in extra]
    wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *extras, *BUILD["requires"])]
    held = {f"{one.name}=={spec.version}.*" for one in wanted for spec in one.specifier if spec.operator == ">="}
    said = subprocess.check_output(["bash", ".ci/floors"], cwd=ROOT, text=True).split()
    assert len(said) >= 8
    assert set(said) == held


TAG, HEADING = f"v{PROJECT['version']}", f"## {PROJECT['version']}\n"
ADDRESS = "https://forge.test/us/inf-dit"


def gate(folder: Path, tag: str = TAG, file: str = "", old: str = "", new: str = "") -> tuple[int, str]:
    """What the first command of publish.yml says of the project's description made ready, then changed in one place."""
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("not yet published", "published")
        text = text.replace("https://forge.example/OWNER/inf-dit", ADDRESS).replace("<this repository>", ADDRESS)
        if name == file:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    script = commands(jobs("publish.yml")["publish"])[0]
    command = ["bash", "-eo", "pipefail", "-c", script]
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_gate_lets_a_version_pass_with_what_the_changelog_says_of_it(tmp_path: Path) -> None:
    older = "\n## 0.0.1\n\nNothing of this.\n"
    last = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines(keepends=True)[-1]
    assert gate(tmp_path, file="CHANGELOG.md", old=last, new=last + older) == (0, "")
    told = (tmp_path / "changes.md").read_text(encoding="utf-8")
    assert last in told
    assert "## " not in told
    assert "Nothing of this" not in told


@pytest.mark.parametrize(
    ("says", "file", "old", "new"),
    [
        ("CHANGELOG.md has nothing under", "CHANGELOG.md", HEADING, "## 0.0.1\n"),
        ("CHANGELOG.md has nothing under", "CHANGELOG.md", HEADING, f"{HEADING}\n## 0.0.1\n"),
        ("say what is true from now on", "CHANGELOG.md", HEADING, f"{HEADING}not yet published\n"),
        *(
            ("write the repository's address in these lines", file, ADDRESS, ours)
            for file, ours in (
                ("pyproject.toml", "https://forge.example/OWNER/inf-dit"),
                ("README.md", "<this repository>"),
                ("CONTRIBUTING.md", "<this repository>"),
            )
        ),
    ],
)
def test_gate_stops_what_is_not_ready(tmp_path: Path, says: str, file: str, old: str, new: str) -> None:
    status, said = gate(tmp_path, file=file, old=old, new=new)
    assert status != 0
    assert says in said


def test_what_lacks_the_repositorys_address_is_what_the_gate_reads_and_contributing_names() -> None:
    script = commands(jobs("publish.yml")["publish"])[0]
    searched = re.search(r"grep -nE '(.+)' (.+); then stop \"write the repository's address", script)
    assert searched is not None
    files = {name: (ROOT / name).read_text("utf-8", errors="replace") for name in tracked() if name[:6] != "tests/"}
    found = {name for name, text in files.items() if re.search(searched[1], text)}
    assert found == set(searched[2].split())
    publishing = files["CONTRIBUTING.md"].partition("\n## Publishing\n")[2]
    assert [name for name in found - {"CONTRIBUTING.md"} if f"`{name}`" not in publishing] == []
    assert "on this page" in publishing


def test_gate_stops_another_tag(tmp_path: Path) -> None:
    status, said = gate(tmp_path, tag="v99.0.0")
    assert status != 0
    assert "the tag is v99.0.0" in said


def test_forge_packs_with_the_comfy_cli_that_publishes() -> None:
    job = jobs("tests.yml")["package"]
    (pin,) = re.findall(r"comfy-cli==[\d.]+", "\n".join(commands(job)))
    assert f"pip install {pin}" in commands(jobs("publish.yml")["publish"])
    assert "-k comfy_cli" in commands(job)[-1]
    assert job["env"]["COMFY_CLI"], "without it the test could skip there"


def test_publishing_waits_for_the_suite_and_needs_one_secret() -> None:
    text = (FORGE / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert jobs("publish.yml")["publish"]["needs"] == "tests"
    assert set(re.findall(r"secrets\.(\w+)", text)) == {"REGISTRY_ACCESS_TOKEN"}
    assert read(FORGE / "workflows" / "publish.yml")[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` so
