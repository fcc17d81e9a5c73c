// The nodes' list of devices: names of GPUs, and what workflows of other machines say. Values stay cuda:0 and so on,
// which mean something on every machine; what is not there is left out when the graph runs.

import { app } from "../../scripts/app.js";

// Of the lists that are ours. A subgraph's outer node shows a promoted one by a copy of its options, these included.
const labellers = new WeakSet();

function devicesOf(node) {
  return (node.widgets ?? []).filter((widget) => labellers.has(widget.options?.getOptionLabel));
}

// Else the editor would mark what a list lacks as wrong. A list that is shown outside of a subgraph is made of the one
// within: so again when lists are read anew.
function admit(node) {
  const lists = devicesOf(node);
  const within = lists.length && node.subgraph ? allNodes(node.subgraph).flatMap(devicesOf) : [];
  for (const shown of lists) {
    for (const { options } of [shown, ...within]) {
      if (shown.value && Array.isArray(options.values) && !options.values.includes(shown.value)) {
        options.values = [...options.values, shown.value];
      }
    }
  }
}

function allNodes(graph = app.graph?.rootGraph ?? app.graph) {
  const nodes = graph?._nodes ?? [];
  return [...nodes, ...nodes.flatMap((node) => (node.subgraph ? allNodes(node.subgraph) : []))];
}

app.registerExtension({
  name: "wan-vae-parallel.devices",
  nodeCreated(node) {
    const names = node.constructor.nodeData?.input?.optional?.devices?.[1]?.device_names;
    const widget = names && node.widgets?.find((one) => one.name === "devices");
    if (widget) {
      widget.options.getOptionLabel = (value) => (names[value] ? `${value} (${names[value]})` : String(value ?? ""));
      labellers.add(widget.options.getOptionLabel);
    }
    if (!widget && !node.subgraph) return;
    // Of what is loaded, copied or pasted.
    const before = node.onConfigure;
    node.onConfigure = function (...given) {
      const result = before?.apply(this, given);
      admit(this);
      return result;
    };
  },
  loadedGraphNode: admit,
  // After the lists were read anew, with R.
  refreshComboInNodes() {
    allNodes().forEach(admit);
  },
});
