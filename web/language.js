// Tells the server the language of this page, in which nodes then say what they do: a prompt does not carry it, and the
// setting is stored only where it was changed by hand.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

let told

function tell() {
    const said = { client: api.clientId, language: app.extensionManager.setting.get("Comfy.Locale") }
    const body = JSON.stringify(said)
    if (!said.client || !said.language || body === told) return
    told = body
    api.fetchApi("/infdit/language", { method: "POST", headers: { "Content-Type": "application/json" }, body })
}

app.registerExtension({
    name: "inf-dit.language",
    setup() {
        api.addEventListener("status", tell) // when connected, and whenever something is queued
        api.addEventListener("reconnected", () => { told = undefined }) // to a server that may have forgotten
        tell()
    },
})
