"""README and the documents that it leads to: links, order, and names that must be those of the code."""

import ast
import re
from pathlib import Path

import pytest

import wan_vae_parallel as wvp
from wan_vae_parallel.cli import _parser

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    links = [(path, link) for path in DOCUMENTS for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text())]
    inner = [(path, link) for path, link in links if not link.startswith("https://")]
    assert len(inner) > 15
    for path, link in inner:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_document_is_reached_from_the_readme():
    for path in DOCUMENTS[1:]:
        assert f"]({path.relative_to(REPOSITORY).as_posix()}" in README, path


def test_readme_answers_in_the_order_in_which_users_ask_and_soon():
    asked = [
        "What it gives you", "Does it run on my card?", "Install", "First graph", "My existing graph",
        "Files and models", "Troubleshooting", "Python", "Shell", "How exact",
    ]  # fmt: skip
    assert re.findall(r"^## (.+)$", README, flags=re.MULTILINE) == asked
    before_python = README[: README.index("\n## Python\n")].splitlines()
    assert len(before_python) < 3 * 45  # screens


@pytest.mark.parametrize("document", ["README.md", "docs/nodes.md"])
def test_nodes_are_called_as_in_the_editor(document):
    named = {
        keyword.value.value
        for path in (REPOSITORY / "nodes").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "display_name"
    }
    assert len(named) == 7
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", (REPOSITORY / document).read_text(), flags=re.MULTILINE)
    assert set(rows) == named
    assert len(rows) == 7


def test_what_python_is_told_to_call_is_there():
    for name in ("README.md", "docs/python.md"):
        text = (REPOSITORY / name).read_text()
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner = {"wvp": wvp, "vae": wvp.VAE}.get(node.value.id)
                    assert owner is None or hasattr(owner, node.attr), node.attr
    told = set(re.findall(r"`(\w+Error)`", (REPOSITORY / "docs/python.md").read_text()))
    assert told == {name for name in wvp.__all__ if name.endswith("Error")} - {"WanVAEError"}


def test_commands_of_the_shell_can_be_read():
    blocks = "\n".join(
        block
        for path in DOCUMENTS
        for block in re.findall(r"```sh\n(.*?)```", path.read_text().replace("\\\n", " "), flags=re.DOTALL)
    )
    commands = re.findall(r"^wan-vae-parallel (.*)$", blocks, flags=re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"decode", "encode", "info", "workflow", "bench"}
    for command in commands:
        _parser().parse_args(command.partition("#")[0].split())


def test_messages_that_documents_explain_are_those_of_the_code():
    texts = []
    for path in [*(REPOSITORY / "wan_vae_parallel").rglob("*.py"), *(REPOSITORY / "nodes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    said = "\n".join(texts)
    pages = [*DOCUMENTS, *(REPOSITORY / "web" / "docs").rglob("*.md")]
    told = [
        (page.name, part.strip(" ,."))
        for page in pages
        # In the first column of the tables that begin so.
        for table in re.findall(
            r"^\| (?:what you see|现象|看到的信息) \|.*\n((?:\|.*\n?)+)", page.read_text("utf-8"), re.MULTILINE
        )
        for quoted in re.findall(r'^\| "(.+?)" ', table, re.MULTILINE)
        for part in quoted.split("...")
    ]
    assert len(told) > 30
    for page, part in told:
        assert part in said or re.sub(r"\d+|frames", "{}", part) in said, (page, part)
