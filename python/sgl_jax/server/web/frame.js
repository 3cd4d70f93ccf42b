// What stands around a conversation: the bar above, the list of conversations, the box below, the dialog for the key.
import { html, useRef, useLayoutEffect } from "./vendor/preact-htm.js";
import { KEY_FIELD, key } from "./api.js";
import { theme, toggleTheme } from "./theme.js";
import { isSend } from "./turn.js";

export function Bar({ app }) {
  const { settings, info } = app, dark = theme() === "dark";
  const option = ({ id }) => html`<option value=${id}>${id}</option>`;
  const adapters = info.models.filter(({ parent }) => parent);
  return html`<header>
    <button aria-label="Conversations" aria-expanded=${app.list} onClick=${() => app.change({ list: !app.list })}>☰</button>
    <select aria-label="Model" value=${app.model} onChange=${(event) => app.set({ model: event.target.value })}>
      ${info.models.filter(({ parent }) => !parent).map(option)}
      ${adapters.length > 0 && html`<optgroup label="Adapters">${adapters.map(option)}</optgroup>`}</select>
    <span class="grow"></span>
    <label class="check small"><input type="checkbox" checked=${settings.probabilities} onChange=${(event) => app.set({ probabilities: event.target.checked })} /> Probabilities</label>
    <button aria-label=${dark ? "Light" : "Dark"} onClick=${() => { toggleTheme(); app.forceUpdate(); }}>${dark ? "☀" : "☾"}</button>
    <button aria-expanded=${settings.open} onClick=${() => app.set({ open: !settings.open })}>Settings</button>
  </header>`;
}

export function List({ app }) {
  const wanted = (app.search ?? "").toLowerCase();
  return html`<nav class="list" aria-label="Conversations">
    <button class="primary" onClick=${() => app.create()}>New chat</button>
    <input type="search" placeholder="Search" aria-label="Search" value=${app.search} onInput=${(event) => app.change({ search: event.target.value })} />
    <ul>${app.conversations.filter(({ title }) => title.toLowerCase().includes(wanted)).map((each) => html`<li key=${each.id}>
      <button class="title" aria-current=${each === app.current} onClick=${() => app.open(each)}>${each.title || "Untitled"}</button>
      <button aria-label="Delete ${each.title}" onClick=${() => app.delete(each)}>✕</button></li>`)}</ul>
    <div class="small"><button onClick=${() => app.export()}>Export</button>
      <label class="button">Import<input type="file" onChange=${(event) => app.import(event.target)} /></label>
      <a href="dashboard">Dashboard</a></div>
  </nav>`;
}

export function Composer({ app, call }) {
  const area = useRef();
  const fit = () => { area.current.style.height = "auto"; area.current.style.height = `${area.current.scrollHeight + 2}px`; };
  useLayoutEffect(() => area.current.focus(), []);
  const send = () => {
    const text = area.current.value;
    if (app.running || !text.trim()) return;
    area.current.value = "";
    fit();
    app.send(text);
  };
  const keys = (event) => {
    if (isSend(event)) send();
    else if (event.key === "ArrowUp" && !area.current.value) app.editLast();
    else return;
    event.preventDefault();
  };
  const hint = call ? `Result of ${call.name}` : app.plain ? "Text to continue" : "Message";
  return html`<div class="composer"><textarea ref=${area} rows="1" aria-label="Message" placeholder=${hint} onInput=${fit} onKeyDown=${keys}></textarea>
    ${app.running ? html`<button class="primary" onClick=${() => app.stop()}>Stop</button>` : html`<button class="primary" onClick=${send}>Send</button>`}</div>`;
}

export function KeyDialog({ wrong, onDone }) {
  const dialog = useRef(), field = useRef(), remember = useRef();
  useLayoutEffect(() => dialog.current.showModal(), []);
  const submit = (event) => {
    event.preventDefault();
    key.set(field.current.value.trim(), remember.current.checked);
    onDone(true);
  };
  return html`<dialog ref=${dialog} onCancel=${() => onDone(false)}><form onSubmit=${submit}>
    <label>API key of this server<input ...${KEY_FIELD} ref=${field} autocomplete="off" defaultValue=${key.get()} /></label>
    ${wrong && html`<p class="error small" role="alert">${wrong}</p>`}
    <label class="check small"><input type="checkbox" ref=${remember} defaultChecked=${key.isRemembered()} /> Remember in this browser</label>
    <footer><button type="button" onClick=${() => onDone(false)}>Cancel</button><button class="primary">Use</button></footer>
  </form></dialog>`;
}
