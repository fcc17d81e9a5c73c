"""A graph written down once, and made into what ComfyUI's editor opens and what its API takes.

Inputs, their order and their types come from a running server's ``/object_info``, so a name that its nodes don't have
is an error here, not in the editor.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

_PACK = "wan-vae-parallel"
_WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", "COMFY_DYNAMICCOMBO_V3"}
_NOTE = "MarkdownNote"
BYPASSED = 4
# What a row of slots, a row of widgets and the rest of a node take in height.
_SLOT, _WIDGET, _FRAME = 20, 24, 14
_WIDTH = 320
# Of a promoted input, as in ComfyUI's own blueprints.
_INPUT_NODE, _OUTPUT_NODE = -10, -20


@dataclass(frozen=True)
class Output:
    """One output of a node, which an input can be given."""

    node: Node
    slot: int


@dataclass(frozen=True)
class Promoted:
    """A value or an input that is set from outside of a subgraph, under a name of its own.

    Attributes:
        name: what it is called there.
        default: what it is set to; nothing for an input that is no widget.
    """

    name: str
    default: Any = None


@dataclass(eq=False)
class Node:
    """A node of a graph: ``node["latent"]`` is one of its outputs, and the node itself its first."""

    id: int
    type: str
    info: Json
    at: tuple[int, int]
    size: tuple[int, int]
    title: str  # of its own; one without is called as its type, in the language of who opens it
    mode: int
    given: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Output:
        return Output(self, self.info["output_name"].index(name))

    def inputs(self) -> dict[str, Any]:
        """All inputs by name, in the editor's order, with their types."""
        kinds = self.info["input"]
        return {name: spec for kind in ("required", "optional") for name, spec in kinds.get(kind, {}).items()}


class Graph:
    """Nodes and what connects them.

    Args:
        server: what the server's ``/object_info`` says.
        models: for files that nodes load, where they are had from and the folder that they belong into.
        versions: of ComfyUI and of this pack, for those who lack nodes of them.
    """

    def __init__(self, server: Json, models: Mapping[str, tuple[str, str]], versions: tuple[str, str]) -> None:
        self._server, self._models, self._versions = server, models, versions
        self._nodes: list[Node] = []
        self._notes: list[Json] = []

    def node(
        self,
        type_: str,
        at: tuple[int, int],
        *,
        title: str = "",
        tall: int = 0,
        mode: int = 0,
        **given: Node | Output | Promoted | Any,
    ) -> Node:
        """Adds a node; of what is not given, widgets have their defaults.

        Raises:
            ValueError: the server has no such node, or the node no such input, or a required one is missing.
        """
        if type_ not in self._server:
            raise ValueError(f"the server has no node {type_}")
        info = self._server[type_]
        node = Node(len(self._nodes) + 1, type_, info, at, (_WIDTH, 0), title, mode)
        node.given = {name: Output(value, 0) if isinstance(value, Node) else value for name, value in given.items()}
        unknown = set(given) - set(node.inputs())
        missing = {name for name, spec in info["input"]["required"].items() if not _is_widget(spec)} - set(given)
        if unknown or missing:
            raise ValueError(f"{type_} has no inputs {sorted(unknown)}, or lacks {sorted(missing)}")
        node.size = (_WIDTH, tall or _height(node))
        self._nodes.append(node)
        return node

    def note(self, at: tuple[int, int], size: tuple[int, int], text: str, title: str) -> None:
        """Adds a note, in Markdown."""
        self._notes.append({"at": at, "size": size, "text": text, "title": title})

    def api(self) -> Json:
        """The graph as the API takes it: without notes and bypassed nodes."""
        prompt = {}
        for node in self._nodes:
            if node.mode == BYPASSED:
                continue
            inputs = {}
            for name, spec in node.inputs().items():
                value = node.given.get(name, _default(spec) if _is_widget(spec) else None)
                if isinstance(value, Output):
                    if value.node.mode != BYPASSED:
                        inputs[name] = [str(value.node.id), value.slot]
                elif _is_widget(spec):
                    inputs[name] = value
            title = node.title or node.info["display_name"] or node.type
            prompt[str(node.id)] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}
        return prompt

    def editor(self, name: str) -> Json:
        """The graph as the editor saves it."""
        nodes, links = self._stored(as_objects=False)
        notes = [self._stored_note(note, number) for number, note in enumerate(self._notes, len(nodes) + 1)]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_PACK}/workflows/{name}")),
            "revision": 0,
            "last_node_id": len(nodes) + len(notes),
            "last_link_id": len(links),
            "nodes": nodes + notes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {"workflowRendererVersion": "LG"},
            "version": 0.4,
        }

    def blueprint(self, name: str, description: str, outputs: Mapping[str, Output]) -> Json:
        """The graph as a subgraph whose promoted inputs are set on its node."""
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_PACK}/subgraphs/{name}"))
        nodes, links = self._stored(as_objects=True)
        by_id = {node["id"]: node for node in nodes}
        inputs: list[Json] = []
        widgets: dict[str, Any] = {}
        for node in self._nodes:
            for input_name, value in node.given.items():
                if not isinstance(value, Promoted):
                    continue
                entries = by_id[node.id]["inputs"]
                slot = next(index for index, entry in enumerate(entries) if entry["name"] == input_name)
                link = _link(len(links) + 1, _INPUT_NODE, len(inputs), node.id, slot, entries[slot]["type"])
                links.append(link)
                entries[slot]["link"] = link["id"]
                if "widget" in entries[slot]:
                    widgets[value.name] = value.default
                inputs.append(_promoted(identity, value.name, link))
        stored_outputs = []
        for index, (output_name, output) in enumerate(outputs.items()):
            entry = by_id[output.node.id]["outputs"][output.slot]
            link = _link(len(links) + 1, output.node.id, output.slot, _OUTPUT_NODE, index, entry["type"])
            links.append(link)
            entry["links"] = [*(entry["links"] or []), link["id"]]
            stored_outputs.append(_promoted(identity, output_name, link))
        left = min(node.at[0] for node in self._nodes) - 240
        # So far away that a renderer that draws nodes wider does not reach it.
        right = max(node.at[0] + node.size[0] for node in self._nodes) + 240
        for column, ports in ((left, inputs), (right, stored_outputs)):
            for row, port in enumerate(ports):
                port["pos"] = [column + (100 if ports is inputs else 20), 20 + 20 * row]
        properties = {
            "proxyWidgets": [["-1", widget] for widget in widgets],
            "cnr_id": _PACK,
            "ver": self._versions[1],
        }
        definition = {
            "id": identity,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": len(nodes) + 1,
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": name,
            "inputNode": {"id": _INPUT_NODE, "bounding": [left, 0, 120, 40 + 20 * len(inputs)]},
            "outputNode": {"id": _OUTPUT_NODE, "bounding": [right, 0, 120, 40 + 20 * len(outputs)]},
            "inputs": inputs,
            "outputs": stored_outputs,
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": links,
            "extra": {"workflowRendererVersion": "LG"},
            "category": "Wan VAE Parallel",
            "description": description,
        }
        place = {
            "id": len(nodes) + 1,
            "type": identity,
            "pos": [0, 0],
            "size": [_WIDTH, _SLOT * (len(inputs) - len(widgets)) + _WIDGET * len(widgets) + _FRAME],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [
                {
                    "name": port["name"],
                    "type": port["type"],
                    **({"widget": {"name": port["name"]}} if port["name"] in widgets else {}),
                    "link": None,
                }
                for port in inputs
            ],
            "outputs": [{"name": port["name"], "type": port["type"], "links": None} for port in stored_outputs],
            "title": name,
            "properties": properties,
            "widgets_values": list(widgets.values()),
        }
        return {
            "revision": 0,
            "last_node_id": place["id"],
            "last_link_id": 0,
            "nodes": [place],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [definition]},
            "extra": {"workflowRendererVersion": "LG"},
        }

    def _stored(self, *, as_objects: bool) -> tuple[list[Json], list[Any]]:
        """Nodes and links as they are saved; in a subgraph links are objects."""
        stored = {node.id: self._stored_node(node) for node in self._nodes}
        links = []
        for node in self._nodes:
            for slot, entry in enumerate(stored[node.id]["inputs"]):
                value = node.given.get(entry["name"])
                if not isinstance(value, Output):
                    continue
                output = stored[value.node.id]["outputs"][value.slot]
                link = _link(len(links) + 1, value.node.id, value.slot, node.id, slot, output["type"])
                entry["link"] = link["id"]
                output["links"] = [*(output["links"] or []), link["id"]]
                links.append(link if as_objects else list(link.values()))
        depths: dict[int, int] = {}
        for node in self._nodes:  # which stand behind all that they take from
            taken = [value.node.id for value in node.given.values() if isinstance(value, Output)]
            depths[node.id] = max([depths[id_] + 1 for id_ in taken], default=0)
        for order, number in enumerate(sorted(depths, key=lambda id_: (depths[id_], id_))):
            stored[number]["order"] = order
        return list(stored.values()), links

    def _stored_node(self, node: Node) -> Json:
        inputs, values = [], []
        # The editor adds the buttons that upload behind all other widgets.
        buttons = ["image" for spec in node.inputs().values() if _uploads(spec)]
        for name, spec in node.inputs().items():
            value = node.given.get(name)
            widget = _is_widget(spec)
            entry: Json = {"localized_name": name, "name": name, "type": _type(spec)}
            if name in node.info["input"].get("optional", {}):
                entry["shape"] = 7
            if widget:
                entry["widget"] = {"name": name}
                chosen = value.default if isinstance(value, Promoted) else value
                values.append(_default(spec) if chosen is None or isinstance(value, Output) else chosen)
                values += ["randomize"] * _is_seed(spec)
            inputs.append({**entry, "link": None})
        values += buttons
        # As the editor has them: those that are no widgets first.
        inputs.sort(key=lambda entry: "widget" in entry)
        ours = node.info["python_module"].startswith("custom_nodes")
        properties: Json = {
            "cnr_id": _PACK if ours else "comfy-core",
            "ver": self._versions[ours],
            "Node name for S&R": node.type,
        }
        files = [self._model(value) for value in values if isinstance(value, str) and value in self._models]
        if files:
            properties["models"] = files
        outputs = zip(node.info["output_name"], node.info["output"], strict=True)
        return {
            "id": node.id,
            "type": node.type,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": 0,
            "mode": node.mode,
            "inputs": inputs,
            "outputs": [{"localized_name": name, "name": name, "type": kind, "links": None} for name, kind in outputs],
            **({"title": node.title} if node.title else {}),
            "properties": properties,
            "widgets_values": values,
        }

    def _model(self, name: str) -> Json:
        url, directory = self._models[name]
        return {"name": name, "url": url, "directory": directory}

    def _stored_note(self, note: Json, number: int) -> Json:
        return {
            "id": number,
            "type": _NOTE,
            "pos": list(note["at"]),
            "size": list(note["size"]),
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": note["title"],
            "properties": {},
            "widgets_values": [note["text"]],
            "color": "#222",
            "bgcolor": "#000",
        }


def _type(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _is_widget(spec: list[Any]) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return _type(spec) in _WIDGETS and not options.get("forceInput")


def _default(spec: list[Any]) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    if "default" in options or not choices:
        return options.get("default")
    return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]


def _is_seed(spec: list[Any]) -> bool:
    """Whether the editor adds a widget behind it that says what becomes of it after a run."""
    return len(spec) > 1 and bool(spec[1].get("control_after_generate"))


def _uploads(spec: list[Any]) -> bool:
    return len(spec) > 1 and bool(spec[1].get("image_upload") or spec[1].get("video_upload"))


def _height(node: Node) -> int:
    specs = list(node.inputs().values())
    widgets = sum(1 + _is_seed(spec) + _uploads(spec) for spec in specs if _is_widget(spec))
    slots = max(sum(not _is_widget(spec) for spec in specs), len(node.info["output"]))
    return _SLOT * slots + (_WIDGET * widgets + _FRAME if widgets else _FRAME - 8)


def _link(id_: int, origin: int, origin_slot: int, target: int, target_slot: int, type_: str) -> Json:
    return {
        "id": id_,
        "origin_id": origin,
        "origin_slot": origin_slot,
        "target_id": target,
        "target_slot": target_slot,
        "type": type_,
    }


def _promoted(subgraph: str, name: str, link: Json) -> Json:
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{subgraph}/{link['id']}"))
    return {"id": identity, "name": name, "type": link["type"], "linkIds": [link["id"]]}
