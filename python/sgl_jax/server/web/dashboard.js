// The dashboard: scrapes /metrics each second while it is looked at, and says in which state the server is.
import { html, render, Component } from "./vendor/preact-htm.js";
import { History, beganAnew, parse, point, recent } from "./dashboard_data.js";
import { Chart, written } from "./dashboard_charts.js";
import { Launch } from "./dashboard_launch.js";
import { KEY_FIELD, WRONG_KEY, key, withKey } from "./api.js";
import { keep, kept, parsed } from "./kept.js";
import { applyTheme } from "./theme.js";

const EVERY_MS = 1000;
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

// Limits as measure_limits writes them; null where a text is something else.
function readLimits(text) {
  const limits = parsed(text);
  return Number.isFinite(limits?.memory_gb_per_s) ? limits : null;
}

// The status is 0 where no answer came.
async function get(path) {
  try {
    const answer = await fetch(path, { headers: withKey(), signal: AbortSignal.timeout(10_000) });
    return { status: answer.status, text: await answer.text() };
  } catch {
    return { status: 0, text: "" };
  }
}

applyTheme();

class Dashboard extends Component {
  state = { status: "connecting", said: "", points: [], info: null, limits: readLimits(kept("limits")), refused: "" };
  history = new History();
  scrapes = [];

  componentDidMount() {
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) return;
      this.forgets = true; // another server may have taken this one's place
      this.poll();
    });
    this.poll();
  }

  poll = async () => {
    if (this.polling || document.hidden) return;
    this.polling = true;
    try {
      await this.scrape();
    } finally {
      this.polling = false;
      clearTimeout(this.timer);
      this.timer = setTimeout(this.poll, EVERY_MS);
    }
  };

  async scrape() {
    const [ready, scraped] = await Promise.all([get("ready"), get("metrics")]);
    if (scraped.status === 401) return this.setState({ status: "key", said: key.get() && WRONG_KEY });
    if (scraped.status !== 200) {
      this.scrapes = [];
      const said = scraped.status ? `The server answered ${scraped.status} for its metrics.` : "The server does not answer.";
      return this.setState({ status: "stopped", said, info: null });
    }
    const metrics = parse(scraped.text), isReady = ready.status === 200;
    const before = this.scrapes.at(-1);
    const forgets = this.forgets || !isReady || (before && beganAnew(before.metrics, metrics));
    this.scrapes = recent([...this.scrapes, { t: Date.now() / 1000, at: performance.now() / 1000, metrics }]);
    const first = this.scrapes[0], last = this.scrapes.at(-1);
    this.forgets = false;
    let info = forgets ? null : this.state.info;
    if (isReady && !info) {
      const answer = await get("get_server_info");
      if (answer.status === 200) info = parsed(answer.text);
    }
    if (isReady) this.history.add(point(first, last, info?.engine, this.limits(info)));
    this.setState({ ...this.judge(ready, metrics), info, points: this.history.points, build: metrics.build_info?.[0].labels });
  }

  judge(ready, metrics) {
    if (ready.status !== 200) {
      const said = parsed(ready.text)?.error?.message ?? "", starts = said.includes("starting");
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
    const input = event.target, [file] = input.files;
    if (!file) return;
    const text = await file.text().catch(() => ""), limits = readLimits(text);
    input.value = ""; // so that the same file can be chosen once more
    if (!limits) return this.setState({ refused: `${file.name} is not a file that measure_limits wrote.` });
    this.setState({ limits, refused: keep("limits", text) ? "" : "The browser does not keep these limits." });
  };

  takeKey = (event) => {
    event.preventDefault();
    key.set(event.target.elements.key.value.trim(), key.isRemembered());
    this.poll();
  };

  render(_, { status, said, points, info, build, limits, refused }) {
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
      ${status === "key" && html`<form onSubmit=${this.takeKey}><label>API key <input ...${KEY_FIELD} name="key" autofocus required /></label><button>Use</button></form>`}
      ${status === "starting" && html`<${Start} said=${said} />`}
      ${points.length > 0 && html`<main class=${status === "ready" ? "" : "stale"}>
        ${panels.map((panel) => html`<${Chart} key=${panel.title} ...${panel} points=${points} note=${notes[panel.title]} />`)}
      </main><${Launch} info=${info} last=${last} limits=${limits} refused=${refused} fits=${this.limits(info) !== null} onLimits=${this.takeLimits} />`}`;
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
