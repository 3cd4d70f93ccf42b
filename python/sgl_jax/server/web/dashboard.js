// The dashboard: scrapes /metrics each second while it is looked at, and says in which state the server is.
import { html, render, Component } from "./vendor/preact-htm.js";
import { History, parse, point } from "./dashboard_data.js";
import { Chart, written } from "./dashboard_charts.js";
import { Launch } from "./dashboard_launch.js";
import { key } from "./api.js";
import { applyTheme } from "./theme.js";

const EVERY_MS = 1000, WINDOW = 6; // rates and percentiles are those of five seconds
const LIMITS = "sgl_jax:limits";
const PANELS = [
  { title: "Tokens per second", kind: "count", lines: [["generated", "generated"], ["prompts", "of prompts"]] },
  { title: "Requests", kind: "count", lines: [["running", "running"], ["waiting", "waiting"]] },
  { title: "Time to first token", kind: "seconds", lines: [["ttft50", "median"], ["ttft95", "95 %"]] },
  { title: "Between two tokens", kind: "seconds", lines: [["itl50", "median"], ["itl95", "95 %"]] },
  { title: "KV pool", kind: "share", lines: [["kv", "running requests"], ["cached", "cached prefixes"]] },
  { title: "Prompt tokens found in the prefix cache", kind: "share", lines: [["hits", "hits"]] },
  { title: "Time of a step", kind: "seconds", lines: [["decode", "decoding alone"], ["step", "all"], ["least", "least"]] },
  { title: "Answers per second, by HTTP status", kind: "count", lines: [["ok", "2xx"], ["refused", "4xx"], ["failed", "5xx"]] },
  { title: "Memory of the engine's process on the host", kind: "bytes", lines: [["memory", "resident"]] },
];
const DRAFTS = { title: "Tokens of a step with drafts", kind: "count", lines: [["accept", "acceptance length"]] };
const ADAPTERS = { title: "LoRA adapters", kind: "count", lines: [["adapters", "loaded"], ["slots", "in slots"]] };

const readLimits = () => { try { return JSON.parse(localStorage.getItem(LIMITS)); } catch { return null; } };

async function get(path) {
  const answer = await fetch(path, { headers: key.get() ? { Authorization: `Bearer ${key.get()}` } : {}, signal: AbortSignal.timeout(10_000) });
  return { status: answer.status, text: await answer.text() };
}

applyTheme();

class Dashboard extends Component {
  state = { status: "connecting", said: "", points: [], info: null, limits: readLimits() };
  history = new History();
  scrapes = [];

  componentDidMount() {
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.poll(); });
    this.poll();
  }

  poll = async () => {
    if (this.polling || document.hidden) return;
    this.polling = true;
    try {
      await this.scrape();
    } catch {
      this.setState({ status: "stopped", said: "The server does not answer.", info: null });
      this.scrapes = [];
    }
    this.polling = false;
    clearTimeout(this.timer);
    this.timer = setTimeout(this.poll, EVERY_MS);
  };

  async scrape() {
    const [ready, scraped] = await Promise.all([get("ready"), get("metrics")]);
    if (scraped.status === 401) return this.setState({ status: "key", said: "" });
    if (scraped.status !== 200) throw new Error(scraped.text);
    const metrics = parse(scraped.text);
    let info = this.state.info;
    if (ready.status === 200 && !info) info = JSON.parse((await get("get_server_info")).text);
    this.scrapes = [...this.scrapes, { t: Date.now() / 1000, metrics }].slice(-WINDOW);
    const first = this.scrapes[0], last = this.scrapes.at(-1);
    if (ready.status === 200) this.history.add(point(first, last, info?.engine, this.limits(info)));
    this.setState({ ...this.judge(ready, metrics), info, points: this.history.points, build: metrics.build_info?.[0].labels });
  }

  judge(ready, metrics) {
    if (ready.status !== 200) {
      const said = JSON.parse(ready.text).error.message, starts = said.includes("starting");
      return { status: starts ? "starting" : "not ready", said };
    }
    const paused = metrics.generation_paused?.[0].value > 0;
    return paused ? { status: "paused", said: "A trainer holds generation; requests wait." } : { status: "ready", said: "" };
  }

  // Limits of a machine are for its own kind of devices.
  limits(info) {
    const { limits } = this.state, engine = info?.engine;
    return limits && engine && ["device_kind", "num_devices"].every((name) => limits[name] === engine[name]) ? limits : null;
  }

  takeLimits = async (event) => {
    const limits = JSON.parse(await event.target.files[0].text());
    localStorage.setItem(LIMITS, JSON.stringify(limits));
    this.setState({ limits });
  };

  takeKey = (event) => {
    event.preventDefault();
    key.set(event.target.elements.key.value, false);
    this.poll();
  };

  render(_, { status, said, points, info, build, limits }) {
    const last = points.at(-1) ?? {}, panels = [...PANELS];
    if (points.some((each) => each.accept !== null)) panels.push(DRAFTS);
    if (last.adapters) panels.push(ADAPTERS);
    const near = last.least ? `${written(last.least / last.decode, "share")} of the memory bandwidth` : last.bandwidth ? `reads ${written(last.bandwidth, "bytes")}/s` : "";
    const notes = { "Time of a step": near };
    return html`
      <header><h1>${build?.model_name ?? "sgl_jax"}</h1>
        <span class=${`badge ${status.replace(" ", "-")}`} data-testid="status">${status}</span>
        <small>${said && `${said} `}${build && `sgl_jax ${build.version}`}</small>
        <nav><a href="./">Chat</a> <a href="metrics">Metrics</a> <a href="docs">API</a></nav></header>
      ${status === "key" && html`<form onSubmit=${this.takeKey}><label>API key <input name="key" type="password" autofocus required /></label><button>Use</button></form>`}
      ${status === "starting" && html`<${Start} said=${said} />`}
      ${points.length > 0 && html`<main class=${status === "ready" ? "" : "stale"}>
        ${panels.map((panel) => html`<${Chart} key=${panel.title} ...${panel} points=${points} note=${notes[panel.title]} />`)}
      </main><${Launch} info=${info} last=${last} limits=${limits} fits=${this.limits(info) !== null} onLimits=${this.takeLimits} />`}`;
  }
}

// The message of a starting server says how much of the weights and programs is there.
function Start({ said }) {
  const weights = /weights (\d+)%/.exec(said), programs = /programs (\d+) of (\d+)/.exec(said);
  return html`<section class="start">
    <label>weights <progress max="100" value=${weights?.[1]} /></label>
    <label>programs <progress max=${programs?.[2] ?? 1} value=${programs?.[1]} /></label></section>`;
}

render(html`<${Dashboard} />`, document.getElementById("root"));
