"""Every snippet and every claim on the pages is executed.

A page is cut at its ``## `` headings. The Python blocks of a section run in order in one
namespace: those a reader sees, and those in comments that begin with ``<!-- check``. A block whose
fence says ``python raises NAME`` must raise that error.
"""

import builtins
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/from_your_loop.md")
BLOCK = re.compile(
    r"^(?:```python(?: raises (?P<raises>\w+))?\n(?P<shown>.*?)^```$"
    r"|<!-- check\n(?P<hidden>.*?)^-->$)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    code: str
    line: int
    raises: str | None = None


@dataclass(frozen=True)
class Section:
    page: str
    title: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.title}"


def sections_of(page: str, text: str) -> list[Section]:
    starts = [0, *(m.start() for m in re.finditer(r"^## ", text, re.MULTILINE)), len(text)]
    found = []
    for start, stop in pairwise(starts):
        blocks = tuple(
            Block(
                code=m["shown"] if m["shown"] is not None else m["hidden"],
                line=text.count("\n", 0, start + m.start()) + 1,
                raises=m["raises"],
            )
            for m in BLOCK.finditer(text[start:stop])
        )
        if blocks:
            title = text[start:stop].splitlines()[0].removeprefix("## ")
            found.append(Section(page, title, blocks))
    return found


def run_section(section: Section) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    for block in section.blocks:
        # Blank lines in front make a traceback show the line of the page.
        code = compile("\n" * block.line + block.code, str(ROOT / section.page), "exec")
        if block.raises is None:
            exec(code, namespace)
        else:
            with pytest.raises(getattr(builtins, block.raises)):
                exec(code, namespace)


def all_sections() -> list[Section]:
    return [
        section
        for page in PAGES
        for section in sections_of(page, (ROOT / page).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("section", all_sections(), ids=str)
def test_every_snippet_and_claim_holds(
    section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run_section(section)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_python_escapes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = sum(len(section.blocks) for section in sections_of(page, text))
    fences = len(re.findall(r"^ *```+ *py", text, re.MULTILINE))
    comments = text.count("<!--")
    assert blocks == fences + comments > 0


PAGE = "## a\n```python\nx = 1\n```\n<!-- check\nassert x == {}\n-->\n## b\n```python\nx = 0\n```\n"


def test_a_page_with_a_false_claim_fails() -> None:
    right, wrong = PAGE.format(1), PAGE.format(2)
    assert [len(section.blocks) for section in sections_of("page", right)] == [2, 1]
    run_section(sections_of("page", right)[0])
    with pytest.raises(AssertionError):
        run_section(sections_of("page", wrong)[0])


def test_a_block_that_should_raise_and_does_not_fails() -> None:
    (section,) = sections_of("page", "```python raises ValueError\nx = 1\n```\n")
    with pytest.raises(pytest.fail.Exception):
        run_section(section)


def test_every_seed_has_its_section() -> None:
    titles = [s.title for s in all_sections() if s.page == "docs/from_your_loop.md"]
    assert [title[:2] for title in titles] == ["1.", "2.", "3.", "4.", "5."]


def test_readme_begins_with_what_a_newcomer_needs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = re.search(r"!\[[^]]+\]\(([^)]+)\)", "\n".join(text.splitlines()[:15]))
    assert picture
    assert (ROOT / picture[1]).stat().st_size < 200_000
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not missing
