"""README, CONTRIBUTING and docs/ are held to the truth: links, commands, tables, code."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packing import packed

from benchmarks.__main__ import main as benchmarks_main
from docs.cards import CARDS, Card, table
from infdit.__main__ import main
from infdit.memory import measure

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
MEMORY = ROOT / "docs" / "memory.md"
Print = Callable[[list[str]], str]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(path), re.MULTILINE | re.DOTALL)


def commands(path: Path, language: str = "sh") -> list[str]:
    """One by one, without the remarks behind them."""
    lines = [line for block in blocks(path, language) for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", part).strip() for line in lines for part in line.split("&&")]


def anchors(path: Path) -> set[str]:
    """Of headings, as forges make them."""
    found = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(path: Path) -> list[tuple[Path, str]]:
    """Files and anchors that a page leads to, without what is elsewhere."""
    prose = re.sub(r"^```.*?^```", "", read(path), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#") for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", prose)]
    return [((path.parent / name).resolve() if name else path, anchor) for name, _, anchor in targets]


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_links_lead_somewhere(path: Path) -> None:
    for file, anchor in links(path):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), (file, anchor)


def test_links_in_the_zip_lead_to_what_is_in_it_and_its_pages_are_found_from_the_readme() -> None:
    files = {(ROOT / name).resolve() for name in packed()}
    pages = {page.resolve() for page in PAGES} & files
    assert [(page, file) for page in pages for file, _ in links(page) if file not in files] == []
    assert pages <= {README.resolve(), *(file for file, _ in links(README))}


def test_pages_that_are_not_in_the_zip_are_found_from_contributing() -> None:
    left_out = {page.resolve() for page in PAGES} - {(ROOT / name).resolve() for name in packed()}
    assert left_out == {CONTRIBUTING.resolve(), *(file for file, _ in links(CONTRIBUTING) if file in left_out)}
    assert f"`{CONTRIBUTING.name}`" in read(README)


def test_a_page_in_the_zip_that_shows_what_is_not_says_where_it_is() -> None:
    """What contributors run: where they run it is said once, before or where it first comes."""
    shown = re.compile(r"-m (?:pytest|docs|benchmarks|training)\b|pytest -m|`(?:tests|benchmarks|training)/")
    for name in sorted(packed()):
        if name.endswith(".md") and (first := shown.search(page := read(ROOT / name))):
            said = page.find("a clone of the repository")
            assert 0 <= said < first.end() + 80, (name, first[0])


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_options_in_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command is asked for its help, in which its options must be."""
    for command in commands(path):
        words = [re.sub(r".*[\\/]", "", word) for word in shlex.split(command)]
        if words[1:3] not in (["-m", "infdit"], ["-m", "benchmarks"]):
            continue
        run = main if words[2] == "infdit" else benchmarks_main
        with pytest.raises(SystemExit) as ended:
            run([*words[3:4], "--help"] if words[2] == "infdit" else ["--help"])
        assert ended.value.code == 0, command
        said = capsys.readouterr().out
        options = [word for word in words[3:] if word.startswith("-")]
        assert [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", said)] == [], command


# ---- figures


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Print:
    def run(arguments: list[str]) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


newer = pytest.mark.skipif(sys.version_info < (3, 11), reason="a run holds a picture more there, and pages do not tell")


@newer
def test_table_of_cards_is_what_its_command_prints() -> None:
    assert f"\n\n{table()}\n\n" in read(README)


@newer
@pytest.mark.parametrize("card", CARDS[::3], ids=lambda card: card.name)
def test_row_of_a_card_is_what_plan_says_beside_one_that_does_so_much(
    card: Card, printed: Print, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = re.search(rf"^\| {card.memory} GB: {card.name} \| {card.tflops}, {card.slot} \| (.+) \|$", read(README), re.M)
    assert row is not None
    cell = row[1].split(" | ")[2]  # published, 8192²
    speed = measure.Speed(flops=card.tflops * 1e12, bus=0.8e9 * card.slot)
    monkeypatch.setattr(measure, "measured", lambda device, dtype: speed)
    budget = 0.9 * (card.memory - 1.5)
    said = printed(["plan", "8192x8192", "--device", "cuda", "--budget", f"{budget}GiB"])
    asked = re.search(r"asked +([\d.]+) GiB +([\d.]+) GiB +0 GiB +([\d.]+ \w+) ", said)
    assert asked is not None
    assert cell == f"{float(asked[1]):.2g} + {float(asked[2]):.2g} GiB, {asked[3]}"
    assert float(asked[1]) < budget


@newer
@pytest.mark.parametrize("command", re.findall(r"^\$ python -m infdit (plan .+)$", read(MEMORY), re.MULTILINE))
def test_plans_are_what_the_command_prints(command: str, printed: Print) -> None:
    assert f"$ python -m infdit {command}\n{printed(command.split())}" in read(MEMORY)


def test_settings_of_the_models_are_those_of_their_files(printed: Print) -> None:
    rows = dict(re.findall(r"^\| (published|bundled) \| (.+) \|$", read(ROOT / "docs" / "sampling.md"), re.MULTILINE))
    assert rows["bundled"].startswith("1, and never more | euler | 0.03 | ")
    assert "1 steps (at most 1) of euler, σ 0.03 to" in printed(["info", "mini"])
    assert rows["published"].startswith("20 | heun | 40 to 0.002 | ")
    published = ROOT / "tests" / "data" / "tiny.mp_rank_00_model_states.pt"
    assert "20 steps of heun, σ 40 to 0.002" in printed(["info", str(published)])


# ---- code


def test_python_of_the_api_page_runs() -> None:
    names: dict[str, object] = {}
    code = blocks(ROOT / "docs" / "api.md", "python")
    assert len(code) > 3
    for block in code:
        exec(block, names)  # noqa: S102 - each goes on where the one before it ended


# ---- CONTRIBUTING


def test_contributors_type_what_the_readme_and_the_forge_run() -> None:
    """Or pytest on files that are there."""
    forge = ROOT / ".github" / "workflows" / "tests.yml"
    known = "\n".join(read(path) for path in (README, ROOT / ".ci" / "run", forge))
    assert len(commands(CONTRIBUTING)) > 5
    for command in commands(CONTRIBUTING):
        pytest_on = re.fullmatch(r"\.venv/bin/python -m pytest -n 0 -x (tests/\w+\.py)", command)
        assert (ROOT / pytest_on[1]).is_file() if pytest_on else command in known, command


@pytest.mark.parametrize("path", [CONTRIBUTING, ROOT / "docs" / "architecture.md"], ids=by_name)
def test_files_that_contributors_are_sent_to_are_there(path: Path) -> None:
    """By their names from the root, or within one of three rooms."""
    prose = re.sub(r"^```.*?^```", "", read(path), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([a-z_\d./-]+(?:\.(?:py|yml|toml|txt)|/))`", prose)
    assert len(named) > 10
    places = [ROOT, *(ROOT / room for room in ("infdit", "nodes", "tests"))]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_setting_up_is_two_commands_and_the_style_ten_lines() -> None:
    assert len(blocks(CONTRIBUTING, "sh")[0].splitlines()) == 2
    style = read(CONTRIBUTING).partition("\n## House style\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", style, re.MULTILINE) == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("heading", ["Quick start", "Tests"])
def test_ci_runs_the_readmes_first_command_after_a_heading(heading: str) -> None:
    section = read(README).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    first = re.search(r"^```(\w+)\n(.+)\n```$", section, re.MULTILINE)
    assert first is not None
    assert first[1] == "sh"
    assert first[2].startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
    assert f'readme "{heading}"' in read(ROOT / ".ci" / "run")
