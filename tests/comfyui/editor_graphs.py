"""What can be told of a workflow as the editor saves it: its graphs, their links, where all of it lies."""

from collections.abc import Iterator
from itertools import combinations

TITLE = 30  # what a node's title takes above it
SLOT, WIDGET = 20, 24
NOTES = {"MarkdownNote", "Note"}
# Ids that stand for a subgraph's own inputs and outputs.
INPUT_NODE, OUTPUT_NODE = -10, -20


def graphs(workflow: dict) -> list[dict]:
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def as_object(link) -> dict:
    if isinstance(link, dict):
        return link
    return dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))


def title(node: dict) -> str:
    """Its own title; one without is called as its type, in the language of who opens it."""
    return node.get("title", node["type"])


def box(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlaps(nodes: list[dict]) -> list[tuple]:
    """Pairs of nodes of which one lies on the other."""
    found = []
    for one, other in combinations(nodes, 2):
        a, b = box(one), box(other)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            found.append((one["type"], other["type"]))
    return found


def behind(graph: dict) -> Iterator[tuple]:
    """Links, drawn as the editor's curves, that pass behind a node that is neither of their ends."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link in map(as_object, graph["links"]):
        origin, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        start = _output(origin, link["origin_slot"]) if origin else graph["inputs"][link["origin_slot"]]["pos"]
        end = _input(target, link["target_slot"]) if target else graph["outputs"][link["target_slot"]]["pos"]
        points = list(_curve(start, end))
        named = (link["type"], *(title(node) if node else "the subgraph" for node in (origin, target)))
        for node in graph["nodes"]:
            left, top, right, bottom = box(node)
            if node not in (origin, target) and any(left < x < right and top < y < bottom for x, y in points):
                yield *named, title(node)
        if origin and any(origin["pos"][0] < x < origin["pos"][0] + origin["size"][0] - 1 for x, _ in points):
            yield *named, title(origin)


def _output(node: dict, slot: int) -> tuple[float, float]:
    return node["pos"][0] + node["size"][0], node["pos"][1] + SLOT * (slot + 0.7)


def _input(node: dict, slot: int) -> tuple[float, float]:
    x, y = node["pos"]
    entry = node["inputs"][slot]
    if "widget" not in entry:
        return x, y + SLOT * (slot + 0.7)
    plain = sum("widget" not in other for other in node["inputs"])
    rows = max(plain, len(node["outputs"]))
    return x, y + SLOT * rows + WIDGET * (slot - plain + 0.7)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """The Bézier curve that the editor draws: it leaves and arrives level."""
    reach = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5 / 4
    xs = (start[0], start[0] + reach, end[0] - reach, end[0])
    ys = (start[1], start[1], end[1], end[1])
    for step in range(201):
        t = step / 200
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        yield tuple(sum(w * v for w, v in zip(weights, values, strict=True)) for values in (xs, ys))
