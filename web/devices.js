// The nodes' list of devices: names of GPUs, and what workflows of other machines say. Values stay cuda:0 and so on,
// which mean something on every machine; what is not there is left out when the graph runs.

import { app } from "../../scripts/app.js";

function devicesOf(node) {
  const names = node.constructor.nodeData?.input?.optional?.devices?.[1]?.device_names;
  return { names, widget: names && node.widgets?.find((one) => one.name === "devices") };
}

app.registerExtension({
  name: "wan-vae-parallel.devices",
  nodeCreated(node) {
    const { names, widget } = devicesOf(node);
    if (widget) {
      widget.options.getOptionLabel = (value) => (names[value] ? `${value} (${names[value]})` : String(value ?? ""));
    }
  },
  // Else the editor would mark it as wrong.
  loadedGraphNode(node) {
    const { widget } = devicesOf(node);
    if (widget?.value && !widget.options.values.includes(widget.value)) {
      widget.options.values = [...widget.options.values, widget.value];
    }
  },
});
