// The nodes' list of devices: names of GPUs, and what workflows of other machines say. Values stay cuda:0 and so on,
// which mean something on every machine; what is not there is left out when the graph runs.

import { app } from "../../scripts/app.js";

function devicesOf(node) {
  const names = node.constructor.nodeData?.input?.optional?.devices?.[1]?.device_names;
  return { names, widget: names && node.widgets?.find((one) => one.name === "devices") };
}

// Else the editor would mark what the list lacks as wrong.
function admit(node) {
  const { widget } = devicesOf(node);
  if (widget?.value && Array.isArray(widget.options.values) && !widget.options.values.includes(widget.value)) {
    widget.options.values = [...widget.options.values, widget.value];
  }
}

function allNodes(graph = app.graph) {
  const nodes = graph?._nodes ?? [];
  return [...nodes, ...nodes.flatMap((node) => (node.subgraph ? allNodes(node.subgraph) : []))];
}

app.registerExtension({
  name: "wan-vae-parallel.devices",
  nodeCreated(node) {
    const { names, widget } = devicesOf(node);
    if (!widget) return;
    widget.options.getOptionLabel = (value) => (names[value] ? `${value} (${names[value]})` : String(value ?? ""));
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
