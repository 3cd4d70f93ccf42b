// The chat page: what it holds, what can be done, and its frame.
import { html, render, Component, useRef, useLayoutEffect } from "./vendor/preact-htm.js";
import * as api from "./api.js";
import { generate, prompt, request } from "./generate.js";
import { Settings, fieldsOf, paramsOf } from "./settings.js";
import * as store from "./store.js";
import { applyTheme, theme, toggleTheme } from "./theme.js";
import { Prompt } from "./tokens.js";
import { Turn } from "./turn.js";

applyTheme();
const isWide = () => matchMedia("(min-width: 60rem)").matches;
const DEFAULTS = { model: "", schema: "", params: {}, plain: false, probabilities: false, top: 5, open: false };

class App extends Component {
  conversations = store.readAll();
  current = this.conversations[0] ?? store.newConversation();
  settings = { ...DEFAULTS, ...store.read("settings", {}) };
  info = { models: [], template: "?", special: new Set(), context: 0 };
  openapi = null;
  running = null; // the turn that is being answered, and what aborts it
  list = isWide(); // whether the list of conversations is open
  on = { key: () => this.askKey(), waiting: (text) => text !== this.waiting && this.change({ waiting: text }) };

  change = (found) => { Object.assign(this, found); this.forceUpdate(); };

  // Draws once for the many changes of a stream.
  soon = () => { this.timer ??= setTimeout(() => { this.timer = null; this.forceUpdate(); }, 30); };

  componentDidMount() {
    addEventListener("keydown", (event) => event.key === "Escape" && !document.querySelector("dialog[open]") && this.stop());
    addEventListener("pagehide", () => this.running && this.save());
    addEventListener("storage", () => !this.running && this.reread());
    this.load();
  }

  reread() {
    this.conversations = store.readAll();
    this.change({ current: this.conversations.find(({ id }) => id === this.current.id) ?? this.current });
  }

  async load() {
    const read = async (path) => (await api.call(path, { on: this.on, patient: true })).json();
    try {
      const models = (await read("v1/models")).data;
      const [about, openapi] = await Promise.all([read("tokenizer_info"), read("openapi.json")]);
      const { special } = this.info; // stays the same set, which an answer that has begun looks into
      for (const token of Object.values(about.added_tokens_decoder)) token.special && special.add(token.content);
      this.change({ openapi, info: { models, special, template: about.chat_template, context: models[0].max_model_len } });
    } catch (error) {
      this.change({ notice: { text: error.message } });
    }
  }

  // The chosen model, if the server still has it.
  get model() { return (this.info.models.find(({ id }) => id === this.settings.model) ?? this.info.models[0])?.id; }

  get plain() { return this.settings.plain || !this.info.template; }

  get fields() { return this.openapi ? fieldsOf(this.openapi, this.plain) : []; }

  // Asks for the key; says whether one was given. Calls that ask meanwhile wait for the same answer.
  askKey() {
    this.keyGiven ??= new Promise((resolve) => this.change({ keyDone: resolve })).then((given) => {
      this.change({ keyDone: null, keyGiven: null });
      if (given && !this.openapi && !this.running) this.load();
      return given;
    });
    return this.keyGiven;
  }

  set(change) {
    this.settings = { ...this.settings, ...change };
    store.write("settings", this.settings);
    this.forceUpdate();
  }

  save() {
    const { current } = this;
    if (!Object.keys(current.turns).length) return;
    this.conversations = [current, ...this.conversations.filter((each) => each !== current)];
    if (!store.save(current)) this.notice = { text: "The browser's store is full. Export or delete conversations." };
  }

  setSystem(text) {
    this.current.system = text;
    this.save();
    this.forceUpdate();
  }

  open(current) { this.change({ current, editing: null, list: isWide() && this.list }); }

  create() { this.open(store.newConversation(this.current.system)); }

  delete(conversation) {
    store.remove(conversation);
    this.conversations = this.conversations.filter((each) => each !== conversation);
    if (this.running && conversation.turns[this.running.turn.id]) this.stop();
    if (conversation === this.current) this.create();
    const undo = () => { store.save(conversation); this.change({ notice: null, conversations: [conversation, ...this.conversations] }); };
    this.change({ notice: { text: `“${conversation.title}” was deleted.`, undo } });
  }

  // --- turns

  choose(turn) {
    store.choose(this.current, turn);
    this.save();
    this.forceUpdate();
  }

  // Sends a text: the next message, or the result of a call that waits for one.
  send(text) {
    const at = store.path(this.current).at(-1);
    const call = waitingCalls(store.path(this.current))[0];
    this.follow(store.add(this.current, at?.id ?? "root", call ? { role: "tool", content: text, call: call.id } : { role: "user", content: text }));
  }

  follow(turn) {
    if (waitingCalls(store.path(this.current)).length) { this.save(); this.forceUpdate(); } else this.answer(turn.id);
  }

  edit(turn, text) {
    const { role, call, thought, calls } = turn;
    const added = store.add(this.current, turn.parent, { role, content: text, call, thought, calls });
    this.editing = null;
    if (role === "assistant") { this.save(); this.forceUpdate(); } else this.follow(added);
  }

  again = (turn) => this.answer(turn.parent, { head: turn.head, thought: turn.head && turn.thought });

  branch = (turn, head) => this.answer(turn.parent, { head, thought: turn.thought });

  async answer(parent, { head, thought } = {}) {
    const { current } = this;
    let params;
    try { params = paramsOf(this.fields, this.settings); } catch (error) { return this.change({ notice: { text: error.message } }); }
    const turn = store.add(current, parent, { role: "assistant", content: head ?? "", head, thought });
    const abort = new AbortController();
    const { probabilities, top } = this.settings;
    const body = request(current, turn, { model: this.model, plain: this.plain, alternatives: probabilities ? top : 0, params });
    this.save();
    this.change({ running: { turn, abort }, notice: null, stick: true });
    try {
      await generate(turn, body, { signal: abort.signal, on: this.on, special: this.info.special, changed: this.soon });
    } catch (error) {
      if (abort.signal.aborted) turn.finish = "stopped";
      else turn.error = error.message;
    }
    this.running = null;
    if (this.conversations.includes(current)) store.save(current);
    this.change({ waiting: "" });
  }

  stop() { this.running?.abort.abort(); }

  editLast() {
    const turn = store.path(this.current).findLast(({ role }) => role === "user");
    if (turn && !this.running) this.change({ editing: turn });
  }

  async showPrompt(turn) {
    const { template, special } = this.info;
    const ask = async (path, body) => (await api.call(path, { body, on: this.on })).json();
    try {
      const { tokens, token_strs } = await ask("tokenize", { ...prompt(this.current, turn, this.plain), return_token_strs: true });
      const { text } = await ask("detokenize", { tokens, skip_special_tokens: false });
      this.change({ prompt: { tokens: token_strs, text, special, cached: turn.stats?.cached, template: !this.plain && template } });
    } catch (error) {
      this.change({ notice: { text: error.message } });
    }
  }

  // --- files

  export() {
    const address = URL.createObjectURL(new Blob([store.exported(this.conversations)], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: address, download: "chats.json" }).click();
    URL.revokeObjectURL(address);
  }

  async import(input) {
    try {
      const found = store.imported(await input.files[0].text());
      const ours = new Set(this.conversations.map(({ id }) => id));
      const added = found.map((each) => (ours.has(each.id) ? { ...each, id: store.newConversation().id } : each));
      const kept = added.every(store.save);
      this.change({ conversations: [...added, ...this.conversations], notice: { text: kept ? `${found.length} conversations were imported.` : "The browser's store is full." } });
    } catch (error) {
      this.change({ notice: { text: error.message } });
    }
    input.value = "";
  }

  // --- views

  componentDidUpdate() {
    const main = document.querySelector("main");
    if (this.stick) main.scrollTop = main.scrollHeight;
  }

  render() {
    const turns = store.path(this.current);
    const stick = ({ target }) => { this.stick = target.scrollHeight - target.scrollTop - target.clientHeight < 40; };
    return html`
      ${this.list && html`<${List} app=${this} />`}
      <div class="chat">
        <${Bar} app=${this} />
        <main onScroll=${stick}><div class="column">
          ${turns.map((turn) => html`<${Turn} key=${turn.id} turn=${turn} app=${this} all=${store.siblings(this.current, turn)} />`)}
          ${!turns.length && html`<p class="empty muted">${this.plain ? "Write a text for the model to continue." : "Ask anything."}</p>`}
        </div></main>
        <footer class="column">
          ${this.waiting && html`<p class="notice" role="status">${this.waiting}</p>`}
          ${this.notice && html`<p class="notice" role="alert">${this.notice.text}
            ${this.notice.undo && html` <button onClick=${this.notice.undo}>Undo</button>`}
            <button aria-label="Dismiss" onClick=${() => this.change({ notice: null })}>✕</button></p>`}
          <${Composer} key=${this.current.id} app=${this} call=${waitingCalls(turns)[0]} />
        </footer>
      </div>
      ${this.settings.open && html`<${Settings} app=${this} />`}
      ${this.keyDone && html`<${Key} onDone=${this.keyDone} />`}
      ${this.prompt && html`<${Prompt} ...${this.prompt} onClose=${() => this.change({ prompt: null })} />`}`;
  }
}

// Calls of the last answer that have no result yet.
function waitingCalls(turns) {
  const answer = turns.findLast(({ role }) => role === "assistant");
  const done = new Set(turns.map(({ call }) => call));
  return turns.at(-1)?.role === "user" ? [] : (answer?.calls ?? []).filter(({ id }) => !done.has(id));
}

function Bar({ app }) {
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

function List({ app }) {
  const wanted = (app.search ?? "").toLowerCase();
  return html`<nav class="list" aria-label="Conversations">
    <button class="primary" onClick=${() => app.create()}>New chat</button>
    <input type="search" placeholder="Search" aria-label="Search" value=${app.search} onInput=${(event) => app.change({ search: event.target.value })} />
    <ul>${app.conversations.filter(({ title }) => title.toLowerCase().includes(wanted)).map((each) => html`<li key=${each.id}>
      <button class="title" aria-current=${each === app.current} onClick=${() => app.open(each)}>${each.title || "Untitled"}</button>
      <button aria-label="Delete ${each.title}" onClick=${() => app.delete(each)}>✕</button></li>`)}</ul>
    <div class="small"><button onClick=${() => app.export()}>Export</button>
      <label class="button">Import<input type="file" accept=".json" onChange=${(event) => app.import(event.target)} /></label>
      <a href="dashboard">Dashboard</a></div>
  </nav>`;
}

function Composer({ app, call }) {
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
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "ArrowUp" && !area.current.value) { event.preventDefault(); app.editLast(); }
  };
  const hint = call ? `Result of ${call.name}` : app.plain ? "Text to continue" : "Message";
  return html`<div class="composer"><textarea ref=${area} rows="1" aria-label="Message" placeholder=${hint} onInput=${fit} onKeyDown=${keys}></textarea>
    ${app.running ? html`<button class="primary" onClick=${() => app.stop()}>Stop</button>` : html`<button class="primary" onClick=${send}>Send</button>`}</div>`;
}

function Key({ onDone }) {
  const dialog = useRef(), field = useRef(), remember = useRef();
  useLayoutEffect(() => dialog.current.showModal(), []);
  const submit = (event) => {
    event.preventDefault();
    api.key.set(field.current.value.trim(), remember.current.checked);
    onDone(true);
  };
  return html`<dialog ref=${dialog} onCancel=${() => onDone(false)}><form onSubmit=${submit}>
    <label>API key of this server<input type="password" ref=${field} autocomplete="off" defaultValue=${api.key.get()} /></label>
    <label class="check small"><input type="checkbox" ref=${remember} /> Remember it in this browser; else it is gone with this tab</label>
    <footer><button type="button" onClick=${() => onDone(false)}>Cancel</button><button class="primary">Use</button></footer>
  </form></dialog>`;
}

render(html`<${App} />`, document.getElementById("root"));
