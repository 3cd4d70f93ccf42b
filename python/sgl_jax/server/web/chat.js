// The chat page: what it holds, and what can be done.
import { html, render, Component } from "./vendor/preact-htm.js";
import { call } from "./api.js";
import { Bar, Composer, KeyDialog, List } from "./frame.js";
import { generate, prompt, request } from "./generate.js";
import { keep, kept, parsed } from "./kept.js";
import { Settings, fieldsOf, paramsOf } from "./settings.js";
import * as store from "./store.js";
import { applyTheme } from "./theme.js";
import { Prompt } from "./tokens.js";
import { Turn } from "./turn.js";

applyTheme();
const ALTERNATIVES = 6; // asked for with each token
const FULL = "The browser’s store is full or switched off. Export or delete conversations.";
const OF_PROMPT = ["tools", "chat_template_kwargs", "reasoning_effort", "add_special_tokens"];
const isWide = () => matchMedia("(min-width: 60rem)").matches;
const DEFAULTS = { model: "", schema: "", params: {}, plain: false, probabilities: false, open: false };

class App extends Component {
  conversations = store.readAll();
  current = this.conversations[0] ?? store.newConversation();
  settings = { ...DEFAULTS, ...parsed(kept("settings")) };
  info = { models: [], template: "?", special: new Set(), context: 0 };
  openapi = null;
  running = null; // the turn that is being answered, its conversation, and what aborts it
  list = isWide(); // whether the list of conversations is open
  on = { key: (wrong) => this.askKey(wrong), waiting: (text) => text !== this.waiting && this.change({ waiting: text }) };

  change = (found) => { Object.assign(this, found); this.forceUpdate(); };

  say = (text, undo) => this.change({ notice: text && { text, undo } });

  // Draws once for the many changes of a stream.
  soon = () => { this.timer ??= setTimeout(() => { this.timer = null; this.forceUpdate(); }, 30); };

  componentDidMount() {
    addEventListener("keydown", (event) => event.key === "Escape" && !document.querySelector("dialog[open]") && this.stop());
    addEventListener("pagehide", () => this.running && this.keep(this.running.conversation));
    this.tryLoad();
  }

  read = async (path) => (await call(path, { on: this.on, patient: true })).json();

  // Reads the API's description, when parameters are shown or set: the server takes a while to write it.
  async describe() {
    this.openapi ??= await this.read("openapi.json");
    this.forceUpdate();
  }

  // Reads what the server serves, once.
  load() {
    const read = async () => {
      const models = (await this.read("v1/models")).data;
      const about = await this.read("tokenizer_info");
      const special = new Set(Object.values(about.added_tokens_decoder).filter((token) => token.special).map(({ content }) => content));
      this.change({ info: { models, special, template: about.chat_template, context: models[0].max_model_len } });
    };
    return this.loading ??= read().catch((error) => { this.loading = null; throw error; });
  }

  tryLoad() { this.load().catch((error) => this.say(error.message)); }

  // Waits for what a request needs. Returns its parameters.
  async prepare() {
    await this.load();
    if (Object.keys(this.settings.params).length) await this.describe();
    return paramsOf(this.fields, this.settings);
  }

  // The chosen model, if the server still has it.
  get model() { return (this.info.models.find(({ id }) => id === this.settings.model) ?? this.info.models[0])?.id; }

  get plain() { return this.settings.plain || !this.info.template; }

  get fields() { return this.openapi ? fieldsOf(this.openapi, this.plain) : []; }

  // Asks for the key; says whether one was given. Calls that ask meanwhile wait for the same answer.
  askKey(wrong) {
    this.keyGiven ??= new Promise((resolve) => this.change({ keyDone: resolve, wrong })).then((given) => {
      this.change({ keyDone: null, keyGiven: null });
      if (given) this.tryLoad();
      return given;
    });
    return this.keyGiven;
  }

  set(change) {
    this.settings = { ...this.settings, ...change };
    if (!keep("settings", JSON.stringify(this.settings))) this.notice = { text: FULL };
    this.forceUpdate();
  }

  keep(conversation) { if (!store.save(conversation)) this.say(FULL); }

  save() {
    const { current } = this;
    if (Object.keys(current.turns).length) {
      this.conversations = [current, ...this.conversations.filter((each) => each !== current)];
      this.keep(current);
    }
    this.forceUpdate();
  }

  setSystem(text) {
    this.current.system = text;
    this.save();
  }

  open(current) { this.change({ current, editing: null, list: isWide() && this.list }); }

  create() { this.open(store.newConversation(this.current.system)); }

  delete(conversation) {
    store.remove(conversation);
    this.conversations = this.conversations.filter((each) => each !== conversation);
    if (this.running?.conversation === conversation) this.stop();
    if (conversation === this.current) this.create();
    const undo = () => { this.change({ notice: null, conversations: [conversation, ...this.conversations] }); this.keep(conversation); };
    this.say(`“${conversation.title}” was deleted.`, undo);
  }

  choose(turn) {
    store.choose(this.current, turn);
    this.save();
  }

  // Sends a text: the next message, or the result of a call that waits for one.
  send(text) {
    const at = store.path(this.current).at(-1);
    const [waiting] = waitingCalls(store.path(this.current));
    const turn = waiting ? { role: "tool", content: text, call: waiting.id } : { role: "user", content: text };
    this.follow(store.add(this.current, at?.id ?? "root", turn));
  }

  follow(turn) {
    if (waitingCalls(store.path(this.current)).length) this.save();
    else this.answer(turn.id);
  }

  edit(turn, text) {
    if (this.running) return;
    const { role, call, thought, calls } = turn;
    const added = store.add(this.current, turn.parent, { role, content: text, call, thought, calls });
    this.editing = null;
    if (role === "assistant") this.save();
    else this.follow(added);
  }

  again(turn) {
    if (this.running) return;
    if (turn.error && !turn.content) store.discard(this.current, turn);
    this.answer(turn.parent, { head: turn.head, thought: turn.head && turn.thought });
  }

  branch = (turn, head) => this.answer(turn.parent, { head, thought: turn.thought });

  async answer(parent, { head, thought } = {}) {
    if (this.running) return;
    const conversation = this.current, abort = new AbortController(), { signal } = abort;
    const turn = store.add(conversation, parent, { role: "assistant", content: head ?? "", head, thought });
    Object.assign(this, { running: { conversation, turn, abort }, notice: null, stick: true });
    this.save();
    try {
      const stopped = new Promise((_, reject) => signal.addEventListener("abort", reject));
      const params = await Promise.race([this.prepare(), stopped]);
      const alternatives = this.settings.probabilities ? ALTERNATIVES : 0;
      const body = request(conversation, turn, { model: this.model, plain: this.plain, alternatives, params });
      await generate(turn, body, { signal, on: this.on, special: this.info.special, changed: this.soon });
    } catch (error) {
      if (signal.aborted) turn.finish = "stopped";
      else turn.error = error.message;
    }
    this.running = null;
    if (this.conversations.includes(conversation)) this.keep(conversation);
    this.change({ waiting: "" });
  }

  stop() { this.running?.abort.abort(); }

  editLast() {
    const turn = store.path(this.current).findLast(({ role }) => role === "user");
    if (turn && !this.running) this.change({ editing: turn });
  }

  async showPrompt(turn) {
    const ask = async (path, body) => (await call(path, { body, on: this.on })).json();
    try {
      const params = Object.entries(await this.prepare()).filter(([name]) => OF_PROMPT.includes(name));
      const { template, special } = this.info;
      const body = { ...Object.fromEntries(params), ...prompt(this.current, turn, this.plain), return_token_strs: true };
      const { tokens, token_strs } = await ask("tokenize", body);
      const { text } = await ask("detokenize", { tokens, skip_special_tokens: false });
      this.change({ prompt: { tokens: token_strs, text, special, cached: turn.stats?.cached, template: !this.plain && template } });
    } catch (error) {
      this.say(error.message);
    }
  }

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
      const kept = added.filter(store.save).length === added.length;
      this.conversations = [...added, ...this.conversations];
      this.say(kept ? `${found.length} conversations were imported.` : FULL);
    } catch (error) {
      this.say(error.message);
    }
    input.value = "";
  }

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
            <button aria-label="Dismiss" onClick=${() => this.say()}>✕</button></p>`}
          <${Composer} key=${this.current.id} app=${this} call=${waitingCalls(turns)[0]} />
        </footer>
      </div>
      ${this.settings.open && html`<${Settings} app=${this} />`}
      ${this.keyDone && html`<${KeyDialog} wrong=${this.wrong} onDone=${this.keyDone} />`}
      ${this.prompt && html`<${Prompt} ...${this.prompt} onClose=${() => this.change({ prompt: null })} />`}`;
  }
}

// Calls of the last answer that have no result yet.
function waitingCalls(turns) {
  const answer = turns.findLast(({ role }) => role === "assistant");
  const done = new Set(turns.map(({ call }) => call));
  return turns.at(-1)?.role === "user" ? [] : (answer?.calls ?? []).filter(({ id }) => !done.has(id));
}

render(html`<${App} />`, document.getElementById("root"));
