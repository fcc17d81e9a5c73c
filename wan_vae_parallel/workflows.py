"""ComfyUI workflows made parallel: Apply Wan VAE Parallel put behind every loader of a VAE of Wan's family.

Three kinds of JSON are understood: what the editor saves (nodes and links, subgraphs in ``definitions``), what it
exports for the API (nodes by id, each with ``class_type`` and ``inputs``), and the latter in a ``prompt``, as it is
posted. Formats: ComfyUI's workflow schema 0.4 and 1, https://docs.comfy.org/specs/workflow_json.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ._version import __version__
from .errors import ArgumentError

Json = dict[str, Any]

APPLY = "WanVAEParallelApply"
APPLY_TITLE = "Apply Wan VAE Parallel"
LOADER = "VAELoader"
# Names under which VAEs of the family are published; those of other architectures with like names come first.
_OTHERS = ("*taew*", "*lighttae*", "*taehv*", "*lightvae*pro*", "*lightvae*lite*")
_FAMILY = ("*wan*vae*", "*vae*wan*", "*lightvae*", "qwen_image*vae*", "*qwen*image*vae*")
# Those of which core's own loader makes an error, up to ComfyUI 0.33, or frames of twelve colours: an Apply is no help.
_NO_MODEL = (
    *("*upscale2x*", "qwen*image*2[._]1*", "*lightvae*2[._]2*"),
    *("*wan*2[._]2*prun*", "*prun*wan*2[._]2*"),
)
# Modes of nodes that are muted or bypassed.
_OFF_MODES = (2, 4)
# Where a link that is a list has what one that is an object has by name.
_LINK_PLACES = {"id": 0, "origin_id": 1, "origin_slot": 2, "target_id": 3, "target_slot": 4, "type": 5}
_SIZE = (320, 154)
# What a node's title takes above it, and what should be between two nodes.
_TITLE, _GAP = 30, 40
# In a subgraph, what its own inputs come from.
_SUBGRAPH_INPUTS = -10


@dataclass(frozen=True)
class Outcome:
    """What became of one VAE loader.

    Attributes:
        graph: name of the subgraph that it is in; empty at the top.
        node: its id.
        file: the VAE's file.
        done: what was done, or why nothing was.
        changed: whether anything was.
    """

    graph: str
    node: str
    file: str
    done: str
    changed: bool = False


def make_parallel(
    workflow: Json, *, devices: str = "auto", dtype: str = "auto", names: Iterable[str] = ()
) -> tuple[Json, list[Outcome]]:
    """Puts Apply Wan VAE Parallel behind each VAE Loader whose file is one of Wan's family, by its name.

    All that took the loader's VAE takes the parallel one then. Loaders that are muted or bypassed, those that an Apply
    follows already, and those of files that core can't load stay as they are; so does everything else.

    Args:
        workflow: an editor's or an API's workflow; it is not changed.
        devices: what the new nodes' ``devices`` say.
        dtype: what their ``dtype`` says.
        names: patterns as in a shell of more files that are such VAEs, upper and lower case alike.

    Returns:
        The new workflow, and what became of each VAE Loader.

    Raises:
        ArgumentError: this is no workflow.
    """
    changed = copy.deepcopy(workflow)
    family = (*_FAMILY, *(name.lower() for name in names))
    known = _Known(family, tuple(name.lower() for name in names))
    widgets = [devices, dtype, 0, "auto"]
    try:
        if isinstance(changed, dict) and isinstance(changed.get("nodes"), list) and "links" in changed:
            return changed, list(_Editor(changed, known, widgets).work())
        prompt = changed.get("prompt", changed) if isinstance(changed, dict) else None
        if isinstance(prompt, dict) and any(_is_api_node(entry) for entry in prompt.values()):
            return changed, list(_change_prompt(prompt, known, widgets))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"this workflow is not as ComfyUI writes one ({type(error).__name__}: {error}); open it in ComfyUI, and "
            f"save it anew"
        ) from error
    raise ArgumentError(
        "this JSON is no workflow of ComfyUI: it has neither 'nodes' and 'links', as the editor saves, nor nodes with "
        "a 'class_type', as it exports for the API"
    )


class _Known:
    """Which files are VAEs of the family."""

    def __init__(self, family: tuple[str, ...], asked: tuple[str, ...]) -> None:
        self._family, self._asked = family, asked

    def __contains__(self, file: str) -> bool:
        name = re.split(r"[/\\]", file.lower())[-1]
        return _fits(name, self._asked) or (not _fits(name, _OTHERS) and _fits(name, self._family))

    def has_no_model(self, file: str) -> bool:
        """Whether core can't load one of these files."""
        name = re.split(r"[/\\]", file.lower())[-1]
        return not _fits(name, self._asked) and _fits(name, _NO_MODEL)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


_NOT_OURS = "left: not a VAE of Wan's family, by its name"
_OFF = "left: muted or bypassed"
_DONE_BEFORE = "left: an Apply follows it already"
_UNUSED = "left: nothing takes its VAE"
_CORE_CAN_NOT = "left: ComfyUI's own loader can't load it; take Load Wan VAE (Parallel) in its place"
_SEVERAL = "left: its subgraph is used with other VAEs, too"
_CHANGED = "made parallel"


def _is_api_node(entry: Any) -> bool:
    return isinstance(entry, dict) and "class_type" in entry


def _change_prompt(prompt: Json, known: _Known, widgets: list[Any]) -> Iterator[Outcome]:
    """Changes nodes in the API's format."""
    nodes = {key: entry for key, entry in prompt.items() if _is_api_node(entry)}
    newest = max([int(number) for key in prompt for number in re.findall(r"\d+", key)], default=0)
    for key, entry in nodes.items():
        if entry["class_type"] != LOADER:
            continue
        file = str(entry.get("inputs", {}).get("vae_name", ""))
        takers = [
            (taker, name)
            for taker in nodes.values()
            for name, value in taker.get("inputs", {}).items()
            if isinstance(value, list) and len(value) == 2 and str(value[0]) == key and value[1] == 0
        ]
        if file not in known:
            yield Outcome("", key, file, _NOT_OURS)
        elif known.has_no_model(file):
            yield Outcome("", key, file, _CORE_CAN_NOT)
        elif any(taker["class_type"] == APPLY for taker, _ in takers):
            yield Outcome("", key, file, _DONE_BEFORE)
        elif not takers:
            yield Outcome("", key, file, _UNUSED)
        else:
            newest += 1
            for taker, name in takers:
                taker["inputs"][name] = [str(newest), 0]
            devices, dtype, chunk, encode_dtype = widgets
            prompt[str(newest)] = {
                "class_type": APPLY,
                "inputs": {
                    "vae": [key, 0],
                    "devices": devices,
                    "dtype": dtype,
                    "chunk": chunk,
                    "encode_dtype": encode_dtype,
                },
                "_meta": {"title": APPLY_TITLE},
            }
            yield Outcome("", key, file, _CHANGED, changed=True)


class _Editor:
    """A workflow as the editor saves it."""

    def __init__(self, workflow: Json, known: _Known, widgets: list[Any]) -> None:
        self._workflow, self._known, self._widgets = workflow, known, widgets
        self._subgraphs: list[Json] = (workflow.get("definitions") or {}).get("subgraphs") or []
        graphs = self._graphs = [workflow, *self._subgraphs]
        # Numbers are taken once for all graphs, as the editor does, which counts them together.
        node_ids = [node["id"] for graph in graphs for node in graph["nodes"] if isinstance(node["id"], int)]
        link_ids = [_Link(link).id for graph in graphs for link in graph.get("links") or []]
        states = [graph.get("state") or {} for graph in graphs]
        self._newest_node = max([*node_ids, *(state.get("lastNodeId", 0) for state in states), _last(workflow, "node")])
        self._newest_link = max([*link_ids, *(state.get("lastLinkId", 0) for state in states), _last(workflow, "link")])

    def work(self) -> Iterator[Outcome]:
        """Changes it."""
        for graph in self._graphs:
            name = "" if graph is self._workflow else str(graph.get("name", ""))
            for node in list(graph["nodes"]):
                if node.get("type") != LOADER:
                    continue
                files = sorted(set(self._files(graph, node)))
                outcome = self._reason(graph, node, files) or _CHANGED
                if outcome == _CHANGED:
                    self._insert(graph, node)
                yield Outcome(name, str(node["id"]), ", ".join(files), outcome, changed=outcome == _CHANGED)

    def _reason(self, graph: Json, loader: Json, files: list[str]) -> str | None:
        """Why a loader stays as it is."""
        ours = [file in self._known for file in files]
        if not any(ours):
            return _NOT_OURS
        if not all(ours):
            return _SEVERAL
        if any(self._known.has_no_model(file) for file in files):
            return _CORE_CAN_NOT
        places = self._places(graph)
        if loader.get("mode", 0) in _OFF_MODES or (
            places and all(place.get("mode", 0) in _OFF_MODES for place in places)
        ):
            return _OFF
        takers = {_Link(link).target for link in graph["links"] if _Link(link).origin == loader["id"]}
        if any(node["id"] in takers and node.get("type") == APPLY for node in graph["nodes"]):
            return _DONE_BEFORE
        return None if takers else _UNUSED

    def _files(self, graph: Json, loader: Json) -> list[str]:
        """What a loader loads: of one in a subgraph, for each place where that stands."""
        values = loader.get("widgets_values")
        own = values.get("vae_name") if isinstance(values, dict) else next(iter(values or []), None)
        entry: Json = next((entry for entry in loader.get("inputs") or [] if entry.get("name") == "vae_name"), {})
        link = next((_Link(link) for link in graph["links"] if _Link(link).id == entry.get("link")), None)
        if link is None or link.origin != _SUBGRAPH_INPUTS:
            return [str(own)]
        name = graph["inputs"][link.origin_slot]["name"]
        return [str(_promoted(place, name) or own) for place in self._places(graph)] or [str(own)]

    def _places(self, graph: Json) -> list[Json]:
        """The nodes that stand for a subgraph."""
        if graph is self._workflow:
            return []
        return [node for other in self._graphs for node in other["nodes"] if node.get("type") == graph["id"]]

    def _insert(self, graph: Json, loader: Json) -> None:
        """Puts an Apply behind a loader: the links to what takes its VAE begin there, and a new one leads to it."""
        self._newest_node += 1
        self._newest_link += 1
        moved = [link for link in map(_Link, graph["links"]) if link.origin == loader["id"]]
        for link in moved:
            link.begin_at(self._newest_node)
        graph["links"].append(_Link.new(self._newest_link, loader["id"], self._newest_node, like=moved[0].stored))
        output = loader["outputs"][0]
        listed, output["links"] = output.get("links") or [], [self._newest_link]
        graph["nodes"].append(
            _apply_node(
                self._newest_node,
                position=_free_place(graph, loader),
                order=loader.get("order", 0) + 1,
                link=self._newest_link,
                links=sorted(
                    (link.id for link in moved), key=lambda id: listed.index(id) if id in listed else len(listed)
                ),
                widgets=self._widgets,
            )
        )
        state = graph.get("state")
        if state is not None:
            state["lastNodeId"], state["lastLinkId"] = self._newest_node, self._newest_link
        for kind, newest in (("node", self._newest_node), ("link", self._newest_link)):
            if f"last_{kind}_id" in self._workflow:
                self._workflow[f"last_{kind}_id"] = newest


class _Link:
    """A link, which is a list at the top of a workflow, and an object in a subgraph and in the newer schema."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def _get(self, key: str) -> Any:
        return self.stored[_LINK_PLACES[key]] if isinstance(self.stored, list) else self.stored.get(key)

    @staticmethod
    def new(number: int, origin: int, target: int, *, like: Any) -> Any:
        """A VAE's link from one node's first output to another's first input, stored as ``like`` is."""
        values = [number, origin, 0, target, 0, "VAE"]
        return values if isinstance(like, list) else dict(zip(_LINK_PLACES, values, strict=True))

    @property
    def id(self) -> int:
        """Its number."""
        return int(self._get("id"))

    @property
    def origin(self) -> Any:
        """The node that it begins at."""
        return self._get("origin_id")

    @property
    def origin_slot(self) -> int:
        """Which output of that."""
        return int(self._get("origin_slot"))

    @property
    def target(self) -> Any:
        """The node that it leads to."""
        return self._get("target_id")

    def begin_at(self, node: int) -> None:
        """Has it begin at another node's first output."""
        for key, value in (("origin_id", node), ("origin_slot", 0)):
            self.stored[_LINK_PLACES[key] if isinstance(self.stored, list) else key] = value


def _last(workflow: Json, kind: str) -> int:
    return int(workflow.get(f"last_{kind}_id") or 0)


def _promoted(place: Json, name: str) -> Any:
    """The value that a subgraph's node gives for one of its inputs, if it has one."""
    values = place.get("widgets_values")
    if isinstance(values, dict):
        return values.get(name)
    widgets = [entry["name"] for entry in place.get("inputs") or [] if entry.get("widget")]
    if isinstance(values, list) and name in widgets and len(values) == len(widgets):
        return values[widgets.index(name)]
    return None


def _apply_node(
    number: int, *, position: list[float], order: int, link: int, links: list[int], widgets: list[Any]
) -> Json:
    kinds = {"devices": "COMBO", "dtype": "COMBO", "chunk": "INT", "encode_dtype": "COMBO"}
    return {
        "id": number,
        "type": APPLY,
        "pos": position,
        "size": list(_SIZE),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {"localized_name": "vae", "name": "vae", "type": "VAE", "link": link},
            *(
                {"localized_name": name, "name": name, "type": kind, "widget": {"name": name}, "link": None}
                for name, kind in kinds.items()
            ),
        ],
        "outputs": [{"localized_name": "VAE", "name": "VAE", "type": "VAE", "links": links}],
        "properties": {"Node name for S&R": APPLY, "cnr_id": "wan-vae-parallel", "ver": __version__},
        "widgets_values": list(widgets),
    }


def _free_place(graph: Json, loader: Json) -> list[float]:
    """Where a node can stand near a loader without lying on another: below it, beside it, above it, or further down."""
    boxes = [_box(node) for node in graph["nodes"]]
    left, top, right, bottom = _box(loader)
    width, height = _SIZE
    under = bottom + _GAP / 2 + _TITLE
    candidates = [(left, under), (right + _GAP, top + _TITLE), (left - _GAP - width, top + _TITLE)]
    candidates.append((left, top - _GAP / 2 - height))
    candidates += [(left, under + step * _GAP) for step in range(1, 500)]
    for x, y in candidates:
        box = (x, y - _TITLE, x + width, y + height)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            return [x, y]
    return [left, under]


def _box(node: Json) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node, its title included."""
    position, size = (_pair(node.get(key)) for key in ("pos", "size"))
    collapsed = (node.get("flags") or {}).get("collapsed")
    width, height = (size[0], 0.0) if collapsed else size
    return position[0], position[1] - _TITLE, position[0] + width, position[1] + height


def _pair(value: Any) -> tuple[float, float]:
    """Two numbers, which older editors store as an object with the keys 0 and 1."""
    if isinstance(value, dict):
        value = [value.get("0", 0), value.get("1", 0)]
    return (float(value[0]), float(value[1])) if value else (200.0, 100.0)
