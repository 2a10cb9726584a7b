// Before and after in core's Compare Images, where a page has it and shows it: ComfyUI 0.8.0 lacks it, and where nodes
// are drawn on the canvas it stays empty. A template says under `extra` what that node would be and which nodes it then
// stands for. What a page has opened no longer says so: nobody's own workflow is changed by opening it.
import { app } from "../../scripts/app.js"

const KEY = "inf-dit.compare"

function shown(type) {
    return type in LiteGraph.registered_node_types && app.extensionManager.setting.get("Comfy.VueNodes.Enabled")
}

app.registerExtension({
    name: KEY,
    beforeConfigureGraph(drawn) {
        const { node, replaces } = drawn.extra?.[KEY] ?? {}
        if (!node) return
        delete drawn.extra[KEY]
        const links = node.inputs.map(({ link }) => drawn.links.find(([id]) => id === link))
        if (!shown(node.type) || links.includes(undefined)) return
        drawn.nodes = [...drawn.nodes.filter(other => !replaces.includes(other.id)), node]
        links.forEach((link, slot) => link.splice(3, 2, node.id, slot))
        drawn.links = drawn.links.filter(([, , , target]) => drawn.nodes.some(({ id }) => id === target))
    },
})
